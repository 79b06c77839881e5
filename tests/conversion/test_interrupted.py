"""A conversion that is interrupted, or writes something wrong, leaves no target; the next one continues, or starts
again."""

import multiprocessing
import pickle
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exprl_megatron.conversion.to_hf import convert_to_huggingface
from exprl_megatron.conversion.to_megatron import convert_to_megatron
from exprl_megatron.conversion.weights import open_weights
from exprl_megatron.errors import UserError

DIRECTIONS = ["to-megatron", "to-hf"]
FIRST = "model-00001-of-*.safetensors"


@pytest.fixture
def convert(tiny_model, tmp_path) -> Callable[..., None]:
    """`convert(direction)` writes tmp_path/target from the same tiny model, in files of 100 kB."""
    model = tiny_model("qwen3")
    convert_to_megatron(model, tmp_path / "source")

    def run(direction: str, **settings) -> None:
        if direction == "to-megatron":
            convert_to_megatron(model, tmp_path / "target", file_bytes=100_000, **settings)
        else:
            weights = open_weights(tmp_path / "source")
            convert_to_huggingface(weights, tmp_path / "target", file_bytes=100_000, **settings)

    return run


@pytest.fixture
def check(tiny_model, tmp_path, tensors, same) -> Callable[[str], None]:
    """Whether tmp_path/target is complete and the model, bit for bit."""

    def run(direction: str) -> None:
        target = tmp_path / "target"
        assert [path.name for path in tmp_path.glob("target*")] == ["target"]
        if direction == "to-megatron":
            convert_to_huggingface(open_weights(target), tmp_path / "back")
            target = tmp_path / "back"
        assert same(tensors(target), tensors(tiny_model("qwen3")))

    return run


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killed_half_way_it_continues_and_ends_bit_equal(convert, check, tmp_path, direction):
    partial = tmp_path / "target.partial"
    second = "written-1" if direction == "to-megatron" else "model-00002-of-*.safetensors"

    def begin() -> None:
        torch.set_num_threads(1)
        convert(direction, advance=lambda done, total: signal.pause() if list(partial.glob(second)) else None)

    killed = multiprocessing.get_context("fork").Process(target=begin)
    killed.start()
    while not list(partial.glob(second)) and killed.is_alive():
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "target").exists()
    with pytest.raises(UserError, match="was never finished"):
        open_weights(partial)
    first = min(partial.rglob("*_0.distcp" if direction == "to-megatron" else "*.safetensors"))
    before = first.stat().st_mtime_ns
    convert(direction)
    written = next((tmp_path / "target").rglob(first.name))
    assert written.stat().st_mtime_ns == before
    check(direction)


def test_what_another_source_left_half_written_is_not_gone_on_with(tiny_model, convert, check, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert_to_megatron(tiny_model("qwen3", seed=1), tmp_path / "target", file_bytes=100_000, advance=interrupt)
    assert [path.name for path in tmp_path.glob("target*")] == ["target.partial"]
    convert("to-megatron")
    check("to-megatron")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_file_that_cannot_be_written_is_one_sentence_and_the_next_attempt_continues(
    convert, check, tmp_path, direction
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"target could not be finished \(.*File too large.*same command again"):
            convert(direction)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("target*")] == ["target.partial"]
    convert(direction)
    check(direction)


def one_missing(partial: Path) -> None:
    change(partial, lambda weights: weights.popitem())


def one_too_many(partial: Path) -> None:
    change(partial, lambda weights: weights.update(extra=torch.zeros(3)))


def other_shape(partial: Path) -> None:
    change(partial, lambda weights: weights.update({(name := min(weights)): weights[name][:-1].clone()}))


def other_dtype(partial: Path) -> None:
    change(partial, lambda weights: weights.update({(name := min(weights)): weights[name].bfloat16()}))


def change(partial: Path, edit: Callable[[dict], object]) -> None:
    """Changes the finished file of a half-written model directory."""
    file = next(partial.glob(FIRST))
    weights = load_file(file)
    edit(weights)
    save_file(weights, file)


def truncated_file(partial: Path) -> None:
    file = next((partial / "megatron").glob("__0_*.distcp"))
    file.write_bytes(file.read_bytes()[:-1000])


def forgotten_rest(partial: Path) -> None:
    rewrite_note(partial, lambda pieces: pieces.pop(0))


def forgotten_piece(partial: Path) -> None:
    rewrite_note(partial, lambda pieces: pieces.pop())


def shortened_piece(partial: Path) -> None:
    def shorten(pieces: list) -> None:
        number = max(range(len(pieces)), key=lambda index: pieces[index].storage_data.length)
        where = pieces[number].storage_data
        pieces[number] = replace(pieces[number], storage_data=replace(where, length=where.length // 2))

    rewrite_note(partial, shorten)


def rewrite_note(partial: Path, edit: Callable[[list], object]) -> None:
    """Changes what was noted of the finished file of half-written Megatron files: first what is no tensor."""
    pieces = pickle.loads((partial / "written-0").read_bytes())
    edit(pieces)
    (partial / "written-0").write_bytes(pickle.dumps(pieces))


@pytest.mark.parametrize(
    ("direction", "spoil", "says"),
    [
        ("to-hf", one_missing, "was not written as it should have been"),
        ("to-hf", one_too_many, "extra .* was not written as it should have been"),
        ("to-hf", other_shape, "was not written as it should have been"),
        ("to-hf", other_dtype, "was not written as it should have been"),
        ("to-megatron", truncated_file, "is truncated"),
        ("to-megatron", forgotten_rest, "does not say where all of common_state"),
        ("to-megatron", forgotten_piece, "does not say where all of "),
        ("to-megatron", shortened_piece, "does not say where all of "),
    ],
)
def test_what_is_not_accounted_for_by_name_shape_and_dtype_is_refused_and_written_again(
    convert, check, tmp_path, direction, spoil, says
):
    partial = tmp_path / "target.partial"
    finished = FIRST if direction == "to-hf" else "written-0"
    with pytest.raises(KeyboardInterrupt):
        convert(direction, advance=lambda done, total: interrupt() if list(partial.glob(finished)) else None)
    spoil(partial)
    with pytest.raises(UserError, match=says):
        convert(direction)
    assert not (tmp_path / "target").exists()
    convert(direction)
    check(direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_progress_is_reported_in_bytes_and_ends_with_all_of_them(convert, tiny_model, tensors, direction):
    told = []
    convert(direction, advance=lambda done, total: told.append((done, total)))
    everything = sum(tensor.nbytes for tensor in tensors(tiny_model("qwen3")).values())
    assert {total for _, total in told} == {everything}
    done = [done for done, _ in told]
    assert done == sorted(set(done))
    assert done[-1] == everything
    assert len(done) > 10


def interrupt(*_) -> None:
    raise KeyboardInterrupt
