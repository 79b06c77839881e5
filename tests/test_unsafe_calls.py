"""Nothing in the code lets data become code: no shell, no eval, no pickle of a stranger, no code of a model's own."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoTokenizer

ROOT = Path(__file__).parents[1]
FILES = sorted(path for part in ("exprl_megatron", "recipes", "tools") for path in (ROOT / part).rglob("*.py"))
CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "torch.load",
    "marshal.loads",
    "dill.loads",
}
KEYWORDS = {"shell": True, "trust_remote_code": True, "weights_only": False}
ALLOWED = {
    # Programs of the policy, in the process that the sandbox contains.
    ("exprl_megatron/rewards/code_program.py", "compile"),
    ("exprl_megatron/rewards/code_program.py", "exec"),
    # What another rank of the run wrote, once its authentication code was checked.
    ("exprl_megatron/policy/signed_objects.py", "pickle.loads"),
    # What this process wrote itself: notes on the parts of an unfinished conversion, and what a benchmark measures.
    ("exprl_megatron/conversion/to_megatron.py", "pickle.loads"),
    ("tools/benchmarks/host/scattering.py", "pickle.loads"),
}


def name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return f"{name_of(function.value)}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def unsafe(source: str) -> set[str]:
    found = set()
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call):
            found |= {name_of(call.func)} & CALLS
            for keyword in call.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in KEYWORDS and value is KEYWORDS[keyword.arg]:
                    found.add(f"{keyword.arg}={value}")
    return found


def test_no_file_calls_what_runs_data():
    found = {(str(path.relative_to(ROOT)), call) for path in FILES for call in unsafe(path.read_text())}
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("yaml.load(text, Loader)", "yaml.load"),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", "trust_remote_code=True"),
        ("torch.load(path)", "torch.load"),
    ],
)
def test_such_a_call_is_found(source, call):
    assert call in unsafe(source)


def test_a_model_directory_runs_no_code(tmp_path):
    """Neither for its tokenizer nor for its config."""
    model, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(ROOT / "recipes/miniature/policy", model)
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    for name, mapped in (("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}), ("config.json", {})):
        path = model / name
        known = json.loads(path.read_text())
        mapped = mapped or {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        path.write_text(json.dumps(known | {"auto_map": mapped}))
    assert AutoTokenizer.from_pretrained(model)("1 + 2").input_ids
    assert AutoConfig.from_pretrained(model).vocab_size == 128
    assert not mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append.__self__.__class__.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.name }}",
    ],
)
def test_a_chat_template_reaches_no_object_of_the_interpreter(template):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/miniature/policy")
    tokenizer.chat_template = template
    with pytest.raises((TemplateError, TypeError)):
        tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False)
