"""A value of `-o` is taken unchanged or refused, never silently cut or converted."""

import os.path
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sidecache as sc
from adapt.config.load_config import load_config
from adapt.config.overrides import TextKind, text_kind
from adapt.config.pipeline import Config
from store.errors import UserError

MINIMAL = {"backbone": {"name": "vit_tiny_patch16_224", "weights": "random"}}
# Texts that YAML converts or refuses.
TEXTS = [
    "runs/try #3", "#3", "a: b", "a:", "- a", "? a", "*x", "&x", "&x y", "!x", "!!int 3", "%x", "@x", "`x`", "a\tb",
    "a\nb", "a=b=c", "no", "on", "off", "y", "1e3", "0x10", "0o7", "010", "1_000", "1:30", "2024-01-01", "3.", ".inf",
    "true", "[1, 2]", "{a: b}", "[", "}", "|", ">", "---", "...", "a, b", "a 'b' \"c\"", "it's", "\\", "<<", "=", "ä €",
    "a\u2028b",
]  # fmt: skip


def load(*overrides: str) -> Config:
    return load_config(MINIMAL, overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load(*overrides)
    return str(refused.value)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_stands(text: str) -> None:
    config = load(f"name={text}", f"run_dir={text}", f"data.root={text}", f"store.path={text}")
    assert config.name == text
    assert {config.run_dir, config.data.root, Path(config.store.path)} == {Path.cwd() / text}


@given(text=st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"]), max_size=30))
def test_any_printable_text_is_a_folder_or_refused(text: str) -> None:
    try:
        taken = load(f"run_dir={text}").run_dir
    except UserError as error:
        assert text == "null" or text != text.strip() or text == "" or text[0] in "\"'~$" or "${" in text
        assert str(error).startswith(("-o run_dir=", "run_dir: given", "'"))  # noqa: PT017
    else:
        if text[0] not in "\"'~":
            assert taken == Path(os.path.normpath(Path.cwd() / text))


@given(text=st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"]), max_size=30))
def test_quotes_hold_any_text(text: str) -> None:
    doubled = text.replace("'", "''")
    assert load(f"name='{doubled}'".replace("$", "")).name == text.replace("$", "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run_dir=", "run_dir: given None; legal: the path of a folder"),
        ("run_dir= a", "the value begins or ends with a blank; leave it out, or put the value in quotes"),
        ("name=a\t", "the value begins or ends with a blank"),
        ('name="a', "is not valid YAML"),
        ('name="a" b', "is not valid YAML"),
        ('name="a" #b', "what follows ` #` is a comment in YAML; put the value in quotes, or leave it out"),
        ("train.epochs=3 #4", "-o train.epochs=3 #4: what follows ` #` is a comment in YAML"),
        ("train.epochs=# 4", "what follows ` #` is a comment in YAML"),
        ("train.seeds=[1, # 2\n3]", "what follows ` #` is a comment in YAML"),
        ("backbone.model_kwargs=depth: 3 # 4", "what follows ` #` is a comment in YAML"),
        ("store.layers.every=2 # 3", "what follows ` #` is a comment in YAML"),
        ("methods=[losa] # all", "what follows ` #` is a comment in YAML"),
        ("store.dtype=int8 # small", "store.dtype: given 'int8 # small'; input should be"),
        ("train.grad_checkpointing=maybe", "train.grad_checkpointing: given 'maybe'"),
    ],
)
def test_a_value_that_yaml_would_cut_is_refused(override: str, message: str) -> None:
    assert message in refusal(override)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=", ""),
        ("name=null", "null"),
        ("store.path=null", str(Path.cwd() / "null")),
        ("name='# a'", "# a"),
        ('name=" a "', " a "),
        ("data.root=null", None),
        ("data.root=", None),
        ("extract.scheduler=null", None),
        ("store.compressor=", None),
        ("train.epochs= 5 ", 5),
        ("train.grad_checkpointing=on", True),
        ("extract.batch_size=auto", "auto"),
        ("backbone.model_kwargs={depth: 3, act_layer: '# a'}", {"depth": 3, "act_layer": "# a"}),
        ("train.lr=1e-3", 0.001),
    ],
)
def test_other_values_are_yaml_and_null_is_none(override: str, value: Any) -> None:
    taken: Any = load(override)
    for part in override.partition("=")[0].split("."):
        taken = getattr(taken, part)
    assert taken == value


def test_keys_of_text_are_known_at_any_depth() -> None:
    assert text_kind(Config, ["name"]) is TextKind.PLAIN
    assert text_kind(Config, ["run_dir"]) is TextKind.NULLABLE
    assert text_kind(Config, ["extract", "scheduler"]) is TextKind.NULLABLE
    for key in ("train.epochs", "methods", "data", "data.video.frames", "store.layers.every", "a", "name.a", "train.a"):
        assert text_kind(Config, key.split(".")) is None


@pytest.fixture
def extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Run `sidecache extract` with options, without its job; returns the configuration."""
    taken: list[Config] = []
    monkeypatch.setattr(sc, "extract", lambda config, **_: taken.append(config))
    monkeypatch.setattr("sidecache.commands.log_extraction", lambda *_: None)
    (tmp_path / "pipeline.yaml").write_text("backbone: {weights: random}")

    def run(*options: str) -> Config:
        monkeypatch.setattr("sys.argv", ["sidecache", "extract", str(tmp_path / "pipeline.yaml"), *options])
        sc.main()
        return taken.pop()

    return run


@pytest.mark.parametrize("given", ["tcp://a:1", "tcp://a:1 #2", 'tcp://"a', "tcp://\\n", "tls://\u20ac"])
def test_a_scheduler_on_the_command_line_is_taken_whole(extract: Callable[..., Config], given: str) -> None:
    assert extract("--scheduler", given, "--workers", "3").extract.scheduler == given


@pytest.mark.parametrize("given", ["", " ", "null", "a # b"])
def test_an_illegal_scheduler_is_refused(
    extract: Callable[..., Config], given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        extract("--scheduler", given)
    assert done.value.code == 2
    assert f"extract.scheduler: given {given!r}; legal: null or the address" in capsys.readouterr().err
