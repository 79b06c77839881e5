"""Tokenizers with the rules of real families, trained on a few lines, and some whose tokens cannot be put together."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "### Step 1\nLet x = 3.14 and y = 2718; don't we'll assume that the sum of the first n terms is at most 10,000.\n\n"
    "So the answer is \\boxed{42}, since a_{n} < b^2 for all n >= 1 (see the lemma above).\n  - first\n  - second\n\n\n"
    "def f(x):\n    return x + 1\n\n步骤一：求和。步骤二：相乘。Größe naïve Ωμέγα 🙂🙃 строка. Done?! Yes...\n"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = _QWEN.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _split(*patterns: str, behavior: str = "isolated"):
    return [pre_tokenizers.Split(Regex(pattern), behavior) for pattern in patterns]


def _bytes_after(*splits):
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_SPACES = normalizers.Replace(" ", "▁")
_RULES = {
    # name: (normalizer, pre-tokenizer, chat template)
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), CHATML),
    "smollm": (
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        CHATML,
    ),
    "qwen": (normalizers.NFC(), _bytes_after(*_split(_QWEN)), CHATML),
    "llama3": (None, _bytes_after(*_split(_LLAMA_3)), TRIMMED),
    "o200k": (None, _bytes_after(*_split(_O200K)), CHATML),
    "deepseek": (None, _bytes_after(*_split(*_DEEPSEEK)), CHATML),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="always"), CHATML),
    "metaspace-first": (normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="first"), CHATML),
    "gemma": (_SPACES, pre_tokenizers.Split(" ", "merged_with_previous"), TRIMMED),
    # From here on no cut is safe.
    "llama2": (normalizers.Sequence([normalizers.Prepend("▁"), _SPACES]), None, CHATML),
    "superwords": (None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), CHATML),
    "chunks": (None, _bytes_after(*_split(r"[\s\S]{1,50}")), CHATML),
    "lookbehind": (None, _bytes_after(*_split(r"(?<=e) ?\p{L}+|" + _QWEN)), CHATML),
    "end of text": (None, _bytes_after(*_split(r"\p{L}+(?=[\s\S]*zebra)|" + _QWEN)), CHATML),
    "squeezed": (normalizers.Replace(Regex("e +"), "e "), _bytes_after(*_split(_QWEN)), CHATML),
    "stripped": (normalizers.Strip(), _bytes_after(*_split(_QWEN)), CHATML),
}
UNCUTTABLE = ("llama2", "superwords", "chunks", "lookbehind", "end of text", "squeezed", "stripped")
CUTTABLE = tuple(name for name in _RULES if name not in UNCUTTABLE)
PROVEN = ("gpt2", "smollm", "qwen", "llama3", "o200k", "deepseek")
"""Those that tokenize each word for itself, where no added token is several words."""


@cache
def tokenizer_of(name: str, merges: int = 500, phrase: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the rules of that family; `phrase`: one of its added tokens is two words."""
    normalizer, splitter, template = _RULES[name]
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300 + merges,
        special_tokens=special,
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), "▁", " ", "\n"],
        show_progress=False,
    )
    if name == "gemma":  # SentencePiece trains on words, whatever is split later
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.train_from_iterator([TEXT * 3, *TEXT.split("\n"), TEXT.replace(" ", "  ")], trainer)
    backend.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=template)
    added = [AddedToken("<think>", special=False, normalized=False), AddedToken("of the", special=False, lstrip=True)]
    tokenizer.add_tokens(added if phrase else added[:1])
    return tokenizer
