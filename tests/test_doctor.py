import json

from exprl_megatron.doctor import examine, print_findings


def test_every_missing_part_says_what_it_prevents():
    findings = examine()
    wanted = {"Python", "torch", "megatron-core", "sglang", "GPUs", "sandbox for programs", "ports", "disk"}
    assert wanted <= {finding.part for finding in findings}
    assert all(finding.ok or finding.prevents for finding in findings)


def test_json_output_is_for_machines(capsys):
    print_findings(as_json=True)
    findings = {f["part"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["megatron-core"] == {"part": "megatron-core", "ok": True, "found": "0.19.2", "prevents": ""}
    assert findings["sglang"]["found"] == "0.5.23"
