"""A model becomes mixtures of its specialists: the whole job, its files and table, runs that are cut short, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_plugins.pipelines.environment import environment
from attn_plugins.pipelines.tuning import continue_pretrain_bam
from attn_plugins.pipelines.tuning.tuned_bam import DENSE, DENSE_LONG, MIXTURES, SEED, TunedBam
from attn_plugins.training.routers import RouterRow
from tests.support.examples import load_example

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_accelerator")
SHORT = [
    "--steps", "3", "--branch-steps", "2", "--batch", "2", "--length", "16", "--save-every", "2", "--held-out", "4",
]  # fmt: skip
DOMAINS = ("code", "prose")


@pytest.fixture(scope="module")
def seed(tiny_llama: Path) -> tuple[str, ...]:
    """A tiny Llama with the embedded model's tokenizer, and two texts: arguments of the example."""
    texts = {"code": "\n    value[{0}] = {0} + rest", "prose": " the line {0} says nothing."}
    arguments = ["--model", str(tiny_llama)]
    for domain, text in texts.items():
        file = tiny_llama / f"{domain}.txt"
        file.write_text("".join(text.format(number) for number in range(400)), encoding="utf-8")
        arguments += ["--domain", domain, str(file)]
    return tuple(arguments)


def run(out: Path, *arguments: str) -> dict[str, Any]:
    accelerate.state.AcceleratorState._reset_state(True)
    load_example("continue_pretrain_bam").main(["--out", str(out), *SHORT, *arguments])
    return json.loads((out / "pretrained.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, seed: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """The job without a stop."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, *seed)


def test_the_example(
    whole: tuple[Path, dict[str, Any]], seed: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out, found = whole
    experts = [f"expert: {domain}" for domain in DOMAINS]
    mixtures = [row for name in MIXTURES for row in (f"{name}, untrained", name)]
    assert list(found["held_out"]) == [SEED, *experts, *mixtures, DENSE, DENSE_LONG]
    assert {name: len(losses) for name, losses in found["losses"].items()} == {
        **dict.fromkeys(experts, 2), **dict.fromkeys(MIXTURES, 3), DENSE: 3, DENSE_LONG: 7,
    }  # fmt: skip
    values = [tuple(found["held_out"][name][domain]) for name in found["held_out"] for domain in DOMAINS]
    assert all(len(items) == 4 for items in values) and len(set(values)) == len(values)  # nothing was judged twice
    sizes = found["sizes"]
    assert sizes[SEED] == sizes[DENSE] < sizes["btx"] < sizes["bam_shared_kv"] < sizes["bam_expert_kv"]
    assert list(found["routers"]) == mixtures
    for mixture, domains in found["routers"].items():
        assert list(domains) == list(DOMAINS)
        for rows in domains.values():
            assert len(rows) == (2 if mixture.startswith("btx") else 4)  # of each layer
            assert all(len(row["load"]) == 3 and sum(row["load"]) == pytest.approx(1, abs=1e-4) for row in rows)
    assert (out / "pretrained.png").read_bytes()[:4] == b"\x89PNG"

    start = transformers.AutoModelForCausalLM.from_pretrained(out / "bam_expert_kv" / "start")
    trained = transformers.AutoModelForCausalLM.from_pretrained(out / "bam_expert_kv")
    assert type(start).__name__ == type(trained).__name__ == "AttnPluginsBamLlamaForCausalLM"
    moved = {name for name, weight in trained.state_dict().items() if not torch.equal(weight, start.state_dict()[name])}
    assert {name for name in start.state_dict() if "router" in name} <= moved  # routers learn
    branches = [transformers.AutoModelForCausalLM.from_pretrained(out / "branches" / name) for name in (SEED, *DOMAINS)]
    gate_up = start.model.layers[0].mlp.experts.gate_up_proj
    for number, branch in enumerate(branches):
        mlp = branch.model.layers[0].mlp
        assert torch.equal(gate_up[number], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))

    with pytest.raises(ValueError, match="is there already: resume"):
        run(out, *seed)
    again = run(out, *seed, "--resume")  # all steps are done: judged once more
    assert again["losses"] == found["losses"] and again["held_out"] == found["held_out"]
    output = capsys.readouterr().out
    assert f"| {DENSE} |" in output and "| bam_shared_kv, untrained |" in output and "mixtures and dense 3" in output
    with pytest.raises(ValueError, match="is of a run with .*seed=0, this one has 1"):
        run(out, *seed, "--resume", "--seed", "1")


def test_a_run_that_is_cut_short_goes_on(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]], seed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a mixture is written, and then while it is trained: the same losses as without a stop."""
    from attn_plugins.models.bam.routing import RoutingCall

    upcycle = continue_pretrain_bam.upcycle

    def cut_writing(settings: Any, out: Any) -> None:
        def stop(what: str, amount: int) -> None:
            raise KeyboardInterrupt

        upcycle(settings, out, tick=stop)

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(continue_pretrain_bam, "upcycle", cut_writing)
        run(tmp_path, *seed)
    assert (tmp_path / "btx" / "start.unfinished").is_dir()

    joined, calls = RoutingCall.joined, []

    def cut_training(self: RoutingCall, loss: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        calls.append(loss)
        if len(calls) == 6:  # in the last step of the second mixture, behind its checkpoint
            raise KeyboardInterrupt
        return joined(self, loss, share)

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(RoutingCall, "joined", cut_training)
        run(tmp_path, *seed, "--resume")
    assert (tmp_path / "bam_shared_kv" / "checkpoint" / "run.json").is_file()
    resumed = run(tmp_path, *seed, "--resume")
    for part in ("losses", "held_out", "routers", "sizes"):
        assert resumed[part] == whole[1][part]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--domain", "law"), "without files .*law.*: give two or more, each with text files"),
        (("--domain", "seed", "{file}"), "'seed'.*give another name"),
        (("--domain", "a/b", "{file}"), "'a/b'.*give another name"),
        (("--domain", "code", "{file}"), "'code' twice"),
        (("--steps", "0"), "steps=0"),
        (("--length", "5000"), "need more text"),
    ],
)
def test_errors_come_before_anything_is_written(
    tmp_path: Path, seed: tuple[str, ...], arguments: tuple[str, ...], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        run(tmp_path / "out", *seed, *(argument.format(file=seed[-1]) for argument in arguments))
    assert not (tmp_path / "out").exists()


def test_one_domain_is_an_error(tmp_path: Path, seed: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"domains \['code'\].*give two or more"):
        run(tmp_path / "out", *seed[:5])


def test_a_seed_of_half_precision_is_trained_as_the_mixtures_are(tmp_path: Path, seed: tuple[str, ...]) -> None:
    """Mixtures are loaded in float32: a dense model in bfloat16 beside them would lose most of its small steps."""
    from attn_plugins.pipelines.tuning.tasks import domains_of
    from attn_plugins.training.loop import LoopSettings

    half = transformers.AutoModelForCausalLM.from_pretrained(seed[1], dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(seed[1]).save_pretrained(tmp_path / "half")
    tasks = domains_of(str(tmp_path / "half"), {"a": [Path(seed[4])], "b": [Path(seed[7])]}, length=16, held_out=4)
    settings = LoopSettings(steps=1, held_out=4)
    found = continue_pretrain_bam.BamPretraining(
        accelerate.Accelerator(cpu=True), tasks, settings, settings, tmp_path / "out", {"btx": MIXTURES["btx"]}
    )
    found.run()
    config = json.loads((tmp_path / "out" / "btx" / "start" / "config.json").read_text())
    assert config["dtype"] == "float32"
    for folder in ("branches/seed", "branches/a", "dense", "btx"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / folder)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}, folder


def test_what_is_told() -> None:
    """Differences are item by item, of the mean over domains; a single item has no interval."""
    held_out = {
        SEED: {"a": [2.0, 2.0], "b": [1.0, 1.0]}, DENSE: {"a": [1.0, 2.0], "b": [1.0, 1.0]},
        "btx": {"a": [0.5, 1.0], "b": [0.7, 1.0]},
    }  # fmt: skip
    row = RouterRow("model.layers.0.mlp", 1.0, 0.9, 0.1, 1, (1.0, 0.0))
    told = TunedBam(
        "M", {"a": "A", "b": "B"}, "perplexity", {"steps": 1, "batch": 2}, {"steps": 3}, 1,
        {SEED: 1000, DENSE: 1000, "btx": 2000}, held_out, {"btx": [1.0]}, {"btx": {"a": [row], "b": [row]}},
        environment(),
    )  # fmt: skip
    gap, half = told.difference("btx", DENSE)
    assert gap == pytest.approx(-0.45) and half == pytest.approx(1.96 * 0.05)
    assert "| btx | 2,000 | 2.12 | 2.34 | -0.4500 ± 0.0980 |" in told.table()
    assert f"| {DENSE} | 1,000 | 4.48 | 2.72 | - |" in told.table()
    assert any("specialists 3 steps, mixtures and dense 1 steps of 2 rows; 2 held-out" in s for s in told.sentences())


SMALL = {
    "--steps": 2, "--branch-steps": 2, "--start-steps": 2, "--batch": 2, "--held-out": 4, "--size": 32,
    "--save-every": 2,
}  # fmt: skip


@pytest.fixture
def tiny_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_plugins.training import classifying

    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    monkeypatch.setattr(classifying, "SMALL", {**classifying.SMALL, **tiny})
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")


def see(out: Path) -> dict[str, Any]:
    accelerate.state.AcceleratorState._reset_state(True)
    told = [str(part) for option in SMALL.items() for part in option]
    load_example("continue_pretrain_bam").main(["--vision", "--out", str(out), *told])
    return json.loads((out / "pretrained.json").read_text())


def test_experts_of_a_vision_transformer(
    tmp_path: Path, tiny_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = see(tmp_path / "out")
    experts = ["expert: digits", "expert: photographs"]
    mixtures = [row for name in MIXTURES for row in (f"{name}, untrained", name)]
    assert (
        list(found["held_out"]) == [SEED, *experts, *mixtures, DENSE, DENSE_LONG] and found["unit"] == "cross-entropy"
    )
    values = [tuple(domains[domain]) for domains in found["held_out"].values() for domain in ("digits", "photographs")]
    assert all(len(items) == 4 for items in values) and len(set(values)) == len(values)
    assert all(len(rows) in (1, 2) for domains in found["routers"].values() for rows in domains.values())
    assert (tmp_path / "out" / "pretrained.png").read_bytes()[:4] == b"\x89PNG"
    trained = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "bam_expert_kv")
    start = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "bam_expert_kv" / "start")
    assert type(trained).__name__ == "AttnPluginsBamViTForImageClassification"
    assert list(trained.config.id2label.values())[9:11] == ["9", "astronaut"] and trained.config.num_labels == 20
    moved = {name for name, weight in trained.state_dict().items() if not torch.equal(weight, start.state_dict()[name])}
    assert {name for name in start.state_dict() if "router" in name} <= moved
    output = capsys.readouterr().out
    assert "2 steps of 2 pictures; 4 held-out pictures of each domain" in output
    cells = next(line for line in output.splitlines() if line.startswith(f"| {SEED} |")).split("|")
    assert all(len(cell.strip().split(".")[1]) == 3 for cell in cells[3:5])  # losses, not perplexities


def test_pictures_and_a_model_of_ones_own(tmp_path: Path, tiny_pictures: None) -> None:
    """Labels are the model's by name; a class that both domains have is one."""
    from PIL import Image

    from attn_plugins.pipelines.tuning.picture_domains import picture_domains

    for domain, classes in {"city": ("car", "cat"), "farm": ("cat", "cow")}.items():
        for number, name in enumerate(classes):
            (tmp_path / domain / name).mkdir(parents=True)
            for picture in range(2):
                Image.new("RGB", (20, 20), (90 * number, 90 * picture, 0)).save(
                    tmp_path / domain / name / f"{picture}.png"
                )

    def model(folder: str, *names: str) -> str:
        told = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.ViTConfig(**sizes, image_size=32, **told)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / folder)
        return str(tmp_path / folder)

    domains = {name: [tmp_path / name] for name in ("city", "farm")}
    start: Any = lambda task: task.load  # noqa: E731
    tasks = picture_domains(model("four", "cow", "dog", "cat", "car"), domains, size=32, start=start)
    assert [int(tasks["city"].held_out(number)[1]) for number in range(2)] in ([3, 2], [2, 3])
    assert {int(tasks["farm"].held_out(number)[1]) for number in range(2)} == {2, 0}
    assert tasks["city"].losses(tasks["city"].load(), tasks["city"].batch(range(2), 0)).shape == (2,)
    three = picture_domains(model("three", "x", "y", "z"), domains, size=32, start=start)
    assert {int(three["farm"].held_out(number)[1]) for number in range(2)} == {1, 2}  # car, cat, cow, in order
    new = picture_domains(None, domains, size=32, start=start)["city"].load()
    assert list(new.config.id2label.values()) == ["car", "cat", "cow"]
    with pytest.raises(ValueError, match=r"tells 2 classes, and the pictures have 3 .*\(car, ...\)"):
        picture_domains(model("two", "x", "y"), domains, size=32, start=start)
    for odd in ({"city": [tmp_path / "city"]}, {**domains, "two": []}):
        with pytest.raises(ValueError, match="give two or more, each with one folder of folders"):
            picture_domains(None, odd, size=32, start=start)
