"""Hostile and mistyped recipes: one message, in bounded time and memory."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from tests.trainer.config.test_recipe import MINIMAL, refusal, write
from trainer.config.load import MAX_CHAIN, load_recipe
from trainer.config.reference_docs import allowed, section_of
from trainer.config.schema import Recipe
from trainer.config.yaml import MAX_DEPTH, MAX_TEXT, MAX_VALUES, parse_yaml
from trainer.errors import RecipeError

ROOT = Path(__file__).parents[3]
OVERRIDES = "model: {preset: tiny, form: scene, frames: 8, overrides: {x: %s}}\n"


def bomb(levels: int) -> str:
    """Each list is ten aliases of the one before."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


WRONG_YAML = {
    "bomb of aliases": (bomb(12), f"more than {MAX_VALUES:,} values, every alias"),
    "bomb of text": ("a: &a '" + "x" * 1000 + "'\nb: [" + "*a, " * 900 + "]\n", "characters, every alias"),
    "recursive list": ("a: &a [1, *a]\n", ":1: a.1: an alias (*name) inside its own value"),
    "recursive mapping": ("model: &m\n  overrides: *m\n", "an alias (*name) inside its own value"),
    "unknown alias": ("a: *b\n", ":1: not valid YAML: found undefined alias"),
    "deep list": ("a: " + "[" * 5000 + "]" * 5000, f":1: more than {MAX_DEPTH} lists and mappings"),
    "deep mapping": ("a: " + "{a: " * 5000 + "}" * 5000, f":1: more than {MAX_DEPTH} lists and mappings"),
    "deep block": ("".join(f"{' ' * i}a:\n" for i in range(300)), f"more than {MAX_DEPTH} lists"),
    "deep aliases": (
        "a: &a " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 20 + "*a" + "]" * 20,
        f"more than {MAX_DEPTH} lists",
    ),
    "many values": ("a: [" + "1, " * 11_000 + "]\n", f"more than {MAX_VALUES:,} values"),
    "binary": ("name: !!binary aGVsbG8=\n", ":1: name: the tag !!binary is not allowed"),
    "timestamp": ("name: !!timestamp 2024-01-01\n", ":1: name: the tag !!timestamp is not allowed"),
    "set": ("name: !!set {a, b}\n", ":1: name: the tag !!set is not allowed"),
    "ordered mapping": ("name: !!omap [a: 1]\n", ":1: name: the tag !!omap is not allowed"),
    "tagged list": ("name: !!python/tuple [1]\n", ":1: name: the tag !!python/tuple is not allowed"),
    "own tag": ("name: !mine {a: 1}\n", ":1: name: the tag !mine is not allowed"),
    "code": ("name: !!python/object/apply:os.system [ls]\n", ":1: name: the tag !!python/object/apply"),
    "no integer": ("seed: !!int abc\n", ":1: seed: abc is no !!int"),
    "no bool": ("seed: !!bool abc\n", ":1: seed: abc is no !!bool"),
    "empty integer": ("seed: !!int ''\n", ":1: seed:  is no !!int"),
    "no float": ("seed: !!float abc\n", ":1: seed: abc is no !!float"),
    "digits": (f"seed: {'9' * 5000}\n", ":1: seed: an integer of 5000 characters"),
    "hexadecimal digits": (f"seed: 0x{'f' * 9000}\n", ":1: seed: an integer of 9002 characters"),
    "octal": ("seed: 010\n", ":1: seed: YAML reads 010 as octal: 8"),
    "base 60": ("\nseed: 1:30\n", ":2: seed: YAML reads 1:30 as base 60: 90"),
    "merge key": ("a: &a {x: 1}\nb:\n  <<: *a\n", ":3: b: recipes have no merge keys"),
    "list as a key": ("? [a, b]\n: 1\n", ":1: a field's name is text"),
    "mapping as a key": ("{{a: 1}: 1}\n", ":1: a field's name is text"),
    "empty key": ("'': 1\n", ":1: a field without a name"),
    "binary key": ("!!binary aGk=: 1\n", ":1: the tag !!binary is not allowed"),
    "duplicate key": ("seed: 1\n'seed': 2\n", ":2: seed: set twice, first on line 1"),
    "several documents": ("seed: 1\n---\nseed: 2\n", "not valid YAML: but found another document"),
    "tab": ("model:\n\tframes: 3\n", ":2: not valid YAML: found character '\\t'"),
    "control character": ("a: 1\nb: \x07\n", ":2: not valid YAML: the character U+0007"),
    "NUL": ("a: 1\nb: \0\n", ":2: not valid YAML: the character U+0000"),
    "NUL as an escape": ('name: "a\\0b"\n', ":1: name: text may not hold the character U+0000"),
    "half a character": ('name: "\\ud800"\n', ":1: name: text may not hold the character U+D800"),
    "no character": ('name: "\\U00110000"\n', ":1: not valid YAML"),
    "version": (f"%YAML {'9' * 5000}.1\n---\na: 1\n", ":1: not valid YAML"),
    "empty": ("", ": found nothing (null); a recipe is a mapping"),
    "only a comment": ("# nothing\n", ": found nothing (null); a recipe is a mapping"),
    "text": ("just words\n", 'found "just words"; a recipe is a mapping'),
    "long text": (f"a: '{'x' * MAX_TEXT}'\n", f"it has {MAX_TEXT + 6:,} bytes; a recipe has at most"),
}


@pytest.mark.parametrize("case", WRONG_YAML)
def test_yaml_that_no_recipe_needs_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    text, expected = WRONG_YAML[case]
    path = write(tmp_path / "wrong.yaml", text)
    (line,) = refusal(path)
    assert expected in line and str(path) in line
    assert len(line) < 1000 and line.isprintable()


@pytest.mark.parametrize("text", [bomb(12), "a: &a '" + "x" * 1000 + "'\nb: [" + "*a, " * 9000 + "]\n"])
def test_aliases_take_no_memory_before_they_are_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "bomb.yaml", text)
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("9" * 5000, "an integer of 5000 characters"),
        ("!!binary aGk=", "the tag !!binary is not allowed"),
        ("010", "YAML reads 010 as octal: 8"),
        ("\x01", "the character U+0001"),
        ("\ud800", "the character U+D800"),
        ("[" * 2000, f"more than {MAX_DEPTH} lists"),
        ("&a [*a]", "an alias (*name) inside"),
        ("1e999", "found Infinity; allowed: an integer, at least 0, "),
        ("yes", "(YAML reads yes as true)"),
        ('""', 'found ""; allowed: an integer'),
        ("x" * 100_000, "(100,002 characters); allowed: an integer"),
        (str(2**70), f"found {2**70}; allowed"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(tmp_path: Path, value: str, expected: str) -> None:
    path = write(tmp_path / "minimal.yaml", MINIMAL)
    (line,) = refusal(path, f"seed={value}")
    assert line.startswith("--set seed=") and expected in line
    assert len(line) < 1000 and line.isprintable()


@pytest.mark.parametrize("key", ["x", "\x07", "é", "a b", "model.\n", ".".join("x" * 1000), "<<", "x" * 9000])
def test_odd_names_of_fields_in_overrides_are_refused(tmp_path: Path, key: str) -> None:
    (line,) = refusal(write(tmp_path / "minimal.yaml", MINIMAL), f'{key}=""')
    assert line.startswith("--set ") and len(line) < 1000 and line.isprintable()


def test_many_mistakes_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "many.yaml", MINIMAL + "".join(f"x{i}: 1\n" for i in range(2000)))
    lines = refusal(path)
    assert len(lines) == 21
    assert lines[-1] == "... and up to 1,980 mistakes more"


def test_other_kinds_of_files_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**33)
    write(tmp_path / "latin", "name: café\n").write_bytes(b"seed: 1\nname: caf\xe9\n")
    (tmp_path / "wide").write_bytes("seed: 1\n".encode("utf-16"))
    expected = {
        "pipe": "it is a pipe, not an ordinary file",
        "folder": "it is a folder, not an ordinary file",
        "/dev/zero": "it is a device, not an ordinary file",
        "loop": "Too many levels of symbolic links",
        "sparse": "it has 8,589,934,592 bytes; a recipe has at most",
        "latin": "not UTF-8 text: line 2 holds the byte 0xE9",
        "wide": "not UTF-8 text: its first bytes say UTF-16",
        "no/such": "No such file or directory",
        "x" * 300: "File name too long",
    }
    for name, words in expected.items():
        (line,) = refusal(tmp_path / name)
        assert words in line
        top = write(tmp_path / "top.yaml", f"seed: 1\nbase: {name}\n")
        (line,) = refusal(top)
        assert line.startswith(f"{top}:2: cannot read the recipe ") and words in line
    for base in ("''", "3", "[3]", "[[a]]", "null"):
        (line,) = refusal(write(tmp_path / "top.yaml", f"base: {base}\n"))
        assert ":1: base: found " in line
    with pytest.raises(RecipeError, match="NUL"):
        load_recipe(Path("a\0b"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_recipe_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "locked.yaml", MINIMAL)
    path.chmod(0)
    (line,) = refusal(path)
    assert "Permission denied" in line


def test_a_chain_of_bases_has_an_end(tmp_path: Path) -> None:
    write(tmp_path / "0.yaml", MINIMAL)
    for number in range(1, 1500):
        write(tmp_path / f"{number}.yaml", f"base: {number - 1}.yaml\n")
    assert load_recipe(tmp_path / f"{MAX_CHAIN - 1}.yaml").name == "test"
    for top in (MAX_CHAIN, 1499):
        (line,) = refusal(tmp_path / f"{top}.yaml")
        assert f"base: more than {MAX_CHAIN} recipes inherit" in line


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "marked.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(path).name == "test"


def test_aliases_and_names_that_yaml_takes_for_something_else_still_work(tmp_path: Path) -> None:
    names = "{1: &a [0, 1], yes: *a, '<<': 0x1F}"
    assert parse_yaml(f"x: {names}", "odd.yaml").value["x"] == {"1": [0, 1], "yes": [0, 1], "<<": 31}
    layers = "local_mhra: 1, global_layers: &a [0, 1], local_layers: *a"
    text = MINIMAL.replace("frames: 8", f"frames: 8, overrides: {{{layers}}}")
    overrides = load_recipe(write(tmp_path / "odd.yaml", text)).model.overrides
    assert overrides == {"local_mhra": 1, "global_layers": [0, 1], "local_layers": [0, 1]}
    recipe = load_recipe(tmp_path / "odd.yaml", ["tracking.experiment='<<'", "tracking.uri='1:30'"])
    assert load_recipe(write(tmp_path / "resolved.yaml", recipe.to_yaml())) == recipe


EXTREME = {
    "run.time_limit_minutes": "1e300",
    "run.hang_minutes": "1e9",
    "run.rendezvous_minutes": "1e9",
    "run.checkpoint_every_minutes": "1e300",
    "run.dir": "x" * 300,
    "model.overrides.norm_eps": ".inf",
    "model.overrides.mlp_ratio": "1e300",
    "model.overrides.width": "1000000000000",
    "model.overrides.depth": "100000",
    "model.overrides.head_dropout": ".nan",
    "model.overrides.global_layers": "[0, .inf]",
    "model.overrides.unknown": "[{a: .nan}]",
    "model.frames": "1000000",
    "model.num_classes": "1000000000000",
    "model.weights": '""',
    "evaluation.clips": "100000",
    "evaluation.batch": "1000000",
    "optimisation.learning_rate": "1e30",
    "optimisation.weight_decay": "1e30",
    "optimisation.global_batch": "1000000000000",
    "optimisation.epochs": "1e30",
    "optimisation.clip_norm": "1e300",
    "data.workers": "1000000",
    "data.prefetch": "1000000",
    "data.threads": "1000000",
    "data.train": "[a, '']",
    "data.embedded": "{train_clips: 1000000000000, val_clips: 1}",
    "augmentation.std": "[1e-300, 1, 1]",
    "augmentation.mean": "[1e300, 1, 1]",
    "augmentation.crop_ratio": "[1e-300, 1]",
    "augmentation.rand_augment": f"rand-m{'9' * 400}-inc1",
    "seed": str(2**70),
}


TINY = {
    "run.time_limit_minutes": "1e-300",
    "run.hang_minutes": "1e-300",
    "run.rendezvous_minutes": "0.001",
    "run.checkpoint_every_minutes": "1e-9",
    "evaluation.every_epochs": "1e-300",
    "model.overrides.norm_eps": "1e-320",
    "optimisation.learning_rate": "1e-320",
    "optimisation.warmup_start": "1e-320",
    "optimisation.end_learning_rate": "1e-30",
    "optimisation.weight_decay": "1e-320",
    "optimisation.epochs": "1e-300",
    "optimisation.eps": "1e-320",
    "optimisation.clip_norm": "1e-300",
    "optimisation.layer_decay": "1e-300",
    "optimisation.ema_decay": "1e-300",
    "data.train": "[{manifest: a, ratio: 1e-300}]",
}


@pytest.mark.parametrize(("name", "value"), [*EXTREME.items(), *TINY.items()])
def test_extreme_values_are_refused_before_anything_starts(tmp_path: Path, name: str, value: str) -> None:
    (line,) = refusal(write(tmp_path / "minimal.yaml", MINIMAL), f"{name}={value}")
    assert line.startswith(f"--set {name}=")
    assert f": {name}" in line


TOGETHER = {
    "{width: 16384, depth: 256}": "model.overrides: width 16384, depth 256",
    "{width: 100, heads: 3}": "model.overrides.heads: heads is 3",
    "{depth: 2, global_layers: [0, 2]}": "model.overrides.global_layers: global_layers is",
    "{patch_size: 7}": "model.overrides: resolution is 64",
    "{recomputed_blocks: 5}": "model.overrides.recomputed_blocks: recomputed_blocks is 5",
}


@pytest.mark.parametrize("overrides", TOGETHER)
def test_overrides_that_do_not_fit_the_preset_are_refused(tmp_path: Path, overrides: str) -> None:
    path = write(tmp_path / "minimal.yaml", MINIMAL)
    (line,) = refusal(path, f"model.overrides={overrides}")
    assert line.startswith("--set model.overrides=") and f": {TOGETHER[overrides]}" in line
    assert load_recipe(path, ["model.overrides={depth: 2, global_layers: [0, 1]}"]).model.overrides
    (line,) = refusal(path, "model.overrides={temporal_downsample: true}", "model.frames=5")
    assert line.startswith("--set model.frames=5: model.frames: frames is 5")


def test_rates_may_be_zero(tmp_path: Path) -> None:
    zero = [f"optimisation.{name}=0" for name in ("warmup_start", "end_learning_rate", "weight_decay")]
    assert load_recipe(write(tmp_path / "minimal.yaml", MINIMAL), zero).optimisation.weight_decay == 0


def test_no_number_of_a_recipe_may_be_arbitrarily_near_to_zero() -> None:
    """Where 0 itself means nothing, there is a smallest value."""
    sections = [(Recipe, "")]
    for section, prefix in sections:
        for name, field in section.model_fields.items():
            if inner := section_of(field.annotation):
                sections.append((inner, f"{prefix}{name}."))
            else:
                assert "above 0" not in allowed(field), prefix + name


def test_every_number_of_a_recipe_has_an_upper_bound() -> None:
    sections = [(Recipe, "")]
    unbounded = []
    for section, prefix in sections:
        for name, field in section.model_fields.items():
            if inner := section_of(field.annotation):
                sections.append((inner, f"{prefix}{name}."))
                continue
            words = allowed(field)
            if ("an integer" in words or "a number" in words) and not (
                "at most" in words or "below" in words
            ):
                unbounded.append(prefix + name)
    assert unbounded == ["augmentation.crop_scale"]  # its own check says: at most the whole frame


def test_a_wrong_recipe_ends_the_program_with_code_2(tmp_path: Path) -> None:
    path = write(tmp_path / "recursive.yaml", MINIMAL + "seed: &a [*a]\n")
    command = [sys.executable, "launch/train.py", "--recipe", str(path), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}:8: seed.0: an alias") and done.stderr.count("\n") == 1
