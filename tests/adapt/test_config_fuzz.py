"""Any configuration and any command line ends in exit status 2 and a message, never in a traceback or a hang."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sidecache as sc
from adapt.config.load_config import load_config
from adapt.job.intrinsic_dimension import parse_dims
from adapt.planning.planner import parse_bytes
from store.errors import UserError

QUICK = settings(
    derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MINIMAL = "backbone: {weights: random}\n"


def refused(folder: Path, text: str) -> str:
    (folder / "pipeline.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(folder / "pipeline.yaml")
    assert len(str(error.value)) < 5000
    assert str(error.value).isprintable() or "\n" in str(error.value)
    return str(error.value)


# Bombs


def laughs(levels: int) -> str:
    lines = (f"a{i}: &a{i} [{','.join(9 * [f'*a{i - 1}'])}]" for i in range(1, levels))
    return "\n".join(["a0: &a0 [x]", *lines])


def merges(levels: int) -> str:
    lines = (f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, levels))
    return "\n".join(["a0: &a0 {x: 1}", *lines])


def sweep(options: int, values: int) -> str:
    names = ("rank", "token_rank", "lr", "weight_decay")[:options]
    lines = (f"  {name}: [{','.join(str(i + 1) for i in range(values))}]" for name in names)
    return MINIMAL + "methods: [losa]\nsweep:\n" + "\n".join(lines)


def two_sweeps(values: int) -> str:
    entries = (f"- {{name: losa, epochs: {k}, sweep: {{rank: [{'1,' * values}]}}}}\n" for k in (1, 2))
    return f"{MINIMAL}methods:\n{''.join(entries)}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(9), "with its aliases written out it holds more than 100,000 values"),
        (merges(40), "with its aliases written out it holds more than 100,000 values"),
        ("a: &a [*a]", "found unconstructable recursive node"),
        ("a: &a {<<: *a}", "backbone: is missing"),
        (MINIMAL + "name: " + "x" * (300 << 10), "is larger than 256 KiB, the limit of a configuration"),
        (MINIMAL + "name: " + "é" * (200 << 10), "is larger than 256 KiB, the limit of a configuration"),
        (MINIMAL + "name: " + "[" * 100_000, "maximum recursion depth exceeded"),
        ("- " * 100_000, "maximum recursion depth exceeded"),
        ("? " * 100_000, "maximum recursion depth exceeded"),
        ("\n".join(f"k{i}: 1" for i in range(2000)), "and 1981 more mistakes"),
        (sweep(4, 300), "methods: losa: its sweep has 8,100,000,000 combinations; legal: at most 10,000"),
        (MINIMAL + "methods: [" + "losa," * 1100 + "]", "legal: a list of method names or of {name: "),
        (two_sweeps(6000), "there are 12,000 trials in all; legal: at most 10,000"),
        (MINIMAL + "train: {epochs: 0x" + "f" * 100_000 + "}", "has more than 64 bits"),
        (MINIMAL + "train: {epochs: 1" + ":1" * 50_000 + "}", "has more than 64 bits"),
        (MINIMAL + "train: {epochs: " + "9" * 25 + "}", "has more than 64 bits"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)  # fmt: skip
def test_a_bomb_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, text)


# Texts


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!python/module:os", "!x y", "!!js x"]
)
def test_a_tag_makes_no_object(tag: str, tmp_path: Path) -> None:
    assert "could not determine a constructor for the tag" in refused(tmp_path, f"{MINIMAL}name: {tag}")


def test_control_characters_of_a_key_are_escaped(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + '"a\\nb\\e[31m\\u202e": 1')
    assert message.startswith("a\\nb\\u001b[31m\\u202e: unknown key")


def test_a_long_key_is_cut(tmp_path: Path) -> None:
    assert len(refused(tmp_path, MINIMAL + "? " + "k" * 100_000 + "\n: 1")) < 400


def test_half_a_surrogate_pair_is_refused_where_it_is_read_and_not_where_it_is_written(tmp_path: Path) -> None:
    assert "'\\ud800' cannot be written as UTF-8" in refused(tmp_path, MINIMAL + 'name: "\\ud800"')


def test_a_variable_that_is_not_utf8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "/data/\udcff")
    assert "cannot be written as UTF-8" in refused(tmp_path, MINIMAL + "run_dir: ${HERE}/a")


# Anything


NAMES = """name run_dir data backbone store extract train methods sweep source root weights path layers tokens lr
seeds rank epochs every last pool image_size model_kwargs search driver trials log_uniform int_uniform choice <<"""
KEYS = st.sampled_from(NAMES.split()) | st.text(max_size=4)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["all", "losa", "random", "${HOME}", "~", "1:1", "0x_", ".inf", "2020-99-99", "\x85", "=", "!"])
)
DOCUMENTS = st.dictionaries(
    KEYS,
    st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)),
    max_size=5,
)
PIECES = """a: ;- ;? ;: ;{;};[;];,;&a ;*a ;!!;!!int ;!!set ;<<: ;';";\\;\n;\n  ;#;%;|;>;@;`;1;.5;e9;~;---;...;\t"""
SYNTAX = st.lists(st.sampled_from(PIECES.split(";"))).map("".join)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "pipeline.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load_or_refuse(path: Path, overrides: tuple[str, ...] = ()) -> None:
    try:
        load_config(path, overrides)
    except UserError as error:
        assert 0 < len(str(error)) < 10_000  # noqa: PT017 (both outcomes are legal)


@QUICK
@given(document=DOCUMENTS, canonical=st.booleans())
def test_any_document_is_a_configuration_or_refused(tmp_path: Path, document: Any, canonical: bool) -> None:
    load_or_refuse(write(tmp_path, yaml.safe_dump(document, canonical=canonical, allow_unicode=True)))
    minimal = {"backbone": {"weights": "random"}}
    load_or_refuse(write(tmp_path, yaml.safe_dump({**document, **minimal})))


@QUICK
@given(text=SYNTAX, minimal=st.booleans())
def test_any_yaml_is_a_configuration_or_refused(tmp_path: Path, text: str, minimal: bool) -> None:
    load_or_refuse(write(tmp_path, MINIMAL * minimal + text))


@QUICK
@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    load_or_refuse(write(tmp_path, content))


@QUICK
@given(key=st.lists(KEYS, min_size=1, max_size=3).map(".".join), text=SYNTAX | st.text(max_size=20))
def test_any_override_is_taken_or_refused(tmp_path: Path, key: str, text: str) -> None:
    load_or_refuse(write(tmp_path, MINIMAL), (f"{key}={text}",))
    load_or_refuse(write(tmp_path, MINIMAL), (text,))


# The command line


Command = Callable[..., str]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command that stops before its job; returns its message."""

    def stop(*_: object, **__: object) -> None:
        raise UserError("the job would begin")

    for place in ("sidecache.extract", "sidecache.run", "sidecache.steps.extract_first"):
        monkeypatch.setattr(place, stop)
    monkeypatch.setattr("sidecache.commands.make_plan", stop)
    write(tmp_path, MINIMAL)

    def attempt(name: str, *options: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sidecache", name, str(tmp_path / "pipeline.yaml"), *options])
        with pytest.raises(SystemExit) as done:
            sc.main()
        out, err = capsys.readouterr()
        assert (done.value.code, out) == (2, "")
        assert err
        assert "Traceback" not in err
        assert not set("\x1b\u202e\ud800").intersection(err)
        return err

    return attempt


# lone surrogates too, as in a file name that is not UTF-8
WORDS = st.text(st.characters(exclude_characters="\0"), max_size=20)


@QUICK
@given(name=st.sampled_from(["run", "extract", "plan", "intrinsic"]), key=KEYS, text=SYNTAX | WORDS)
def test_any_override_on_the_command_line_ends_in_a_message(command: Command, name: str, key: str, text: str) -> None:
    assert command(name, "-o", f"{key}={text}".replace("\0", ""))


@QUICK
@given(text=WORDS | st.floats().map(str) | st.tuples(st.integers(), st.sampled_from(["GB", "MiB", "B", "XB"])).map(
    lambda pair: f"{pair[0]}{pair[1]}"))  # fmt: skip
def test_any_budget_is_bytes_or_refused(command: Command, text: str) -> None:
    try:
        assert parse_bytes(text) >= 0
    except UserError as error:
        assert "is not a number of bytes; legal: such as 20GB" in str(error)  # noqa: PT017
    assert command("plan", f"--budget={text}")


@QUICK
@given(text=WORDS | st.lists(st.integers() | st.floats(), max_size=4).map(lambda dims: ",".join(map(str, dims))))
def test_any_dims_are_whole_numbers_or_refused(command: Command, text: str) -> None:
    try:
        assert min(parse_dims(text)) >= 1
    except UserError as error:
        assert "legal: positive whole numbers with commas between" in str(error)  # noqa: PT017
    assert command("intrinsic", f"--dims={text}")


def test_a_configuration_that_is_no_file_ends_in_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / ("x" * 300), Path("/dev/zero"), Path("\udcff.yaml")):
        monkeypatch.setattr(sys, "argv", ["sidecache", "plan", str(path)])
        with pytest.raises(SystemExit) as done:
            sc.main()
        assert done.value.code == 2
        assert capsys.readouterr().err.startswith("sidecache: ")
