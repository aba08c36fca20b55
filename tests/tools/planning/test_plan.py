"""The plan against real models: bytes by kind exactly, activations within 10%; and the command line."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch
from hydra import compose, initialize_config_dir

from nemo_vopd.command_line import CONF
from nemo_vopd.config import Config
from nemo_vopd.tools.planning.assumptions import PlanConfig
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.validation import from_hydra
from tests.distributed import ROOT, run_distributed, run_recipe
from tests.helpers import tiny_config

SHIPPED = sorted(file.stem for file in CONF.glob("train_*.yaml"))
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vision_depth": 3}


class Alive:
    """Bytes of the storages autograd keeps, each counted once, parameters excepted; and their highest sum."""

    def __init__(self, excluded) -> None:
        self.excluded = {p.untyped_storage().data_ptr() for p in excluded}
        self.users: Counter = Counter()
        self.now = self.most = 0

    def pack(self, tensor):
        return Kept(self, tensor)

    def change(self, tensor, step: int) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self.excluded:
            return
        before, self.users[key] = self.users[key], self.users[key] + step
        if (before == 0) != (self.users[key] == 0):
            self.now += step * storage.nbytes()
            self.most = max(self.most, self.now)


class Kept:
    """One saved tensor, until the graph lets go of it."""

    def __init__(self, alive: Alive, tensor) -> None:
        self.alive, self.tensor = alive, tensor
        alive.change(tensor, 1)

    def __del__(self) -> None:
        self.alive.change(self.tensor, -1)


def storage_bytes(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def count(config: Config, world_size: int):
    from nemo_vopd.tools.planning.count import architecture, count_model

    return count_model(config, architecture(config), world_size).stages


def measure(config: Config) -> dict:
    """(what the plan's formulas say, what is there) by kind, on this rank."""
    from nemo_vopd.mcore import parallel
    from nemo_vopd.mcore.pipeline_passes import student_pass, teacher_pass
    from nemo_vopd.model import VisionOPDModel
    from nemo_vopd.rollout.native.cache import KVCache
    from nemo_vopd.tools.planning.memory import ActivationLaw, kv_cache_bytes, most_alive
    from nemo_vopd.tools.planning.workload import Packed
    from nemo_vopd.vlm.build import hf_config

    groups = parallel.initialize(config.parallel, seed=1)
    model = VisionOPDModel(config, groups)
    megatron, number = model.student.config, groups.pp.rank()
    first, last = parallel.is_first_stage(groups), parallel.is_last_stage(groups)
    samples = next(iter(model.train_dataloader())).samples

    caches = []
    plain = KVCache.__init__

    def noted(cache, *args) -> None:
        caches.append(cache)
        plain(cache, *args)

    KVCache.__init__ = noted
    params = model.sampling_params
    model.engine.params = params.__class__(**{**vars(params), "end_token_ids": ()})
    rollouts = model.engine.generate(samples)
    tensors = [t for cache in caches for pair in (*cache.prompt.values(), *cache.response.values()) for t in pair]
    num_layers = sum(len(chunk.language.decoder.layers) for chunk in model.student.chunks)
    longest = max(sample.student.num_tokens for sample in samples)
    positions = len(samples) * (longest + params.n * params.max_response_length)
    result = {"kv_cache": (kv_cache_bytes(megatron, num_layers, positions), storage_bytes(tensors))}

    students, teachers = model._microbatches(rollouts)
    hidden = teacher_pass(model.teacher_model, teachers, groups)
    model.student_optimizer.zero_grad()
    law = ActivationLaw(config, hf_config(config), megatron, transformer_engine=False)
    widest = max(students, key=lambda batch: batch.token_ids.numel())
    packed = Packed(len(widest.packing.lengths), widest.token_ids.numel(), 0, 0, len(widest.pixel_values), 0)
    # what neighbours send and get is not autograd's, but kept by the schedule
    ends = packed.num_tokens * law.boundary * (int(not first) + int(not last))
    per_microbatch = law.stage_bytes(packed, num_layers, first=first, last=last) - ends
    alive = Alive([*model.student.parameters(), *(chunk.grad_data for d in model.student_ddp for chunk in d.buffers)])
    with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda kept: kept.tensor):
        student_pass(model.student, model.student_ddp, students, model._loss(students, hidden), groups)
    expected = most_alive(len(students), groups.pp.size(), number, [per_microbatch])
    # one layer, then one block of the tower, computed again: to the plan, workspace
    expected += packed.num_tokens * (law.layer - law.kept)
    result["activations"] = (expected, alive.most)

    assert model.student_optimizer.step(1e-5)[0]
    buffers = [buffer for ddp in model.student_ddp for buffer in ddp.buffers]
    state = model.student_optimizer.state_shards(model.student)
    moments = [shard for kind in ("exp_avg", "exp_avg_sq") for shard, _ in state[kind].values()]
    main = [shard for shard, _ in state["student"].values()] if megatron.bf16 else []
    frozen = storage_bytes(p for p in model.student.parameters() if not p.requires_grad)  # the teacher's as well
    real = {
        "weights": storage_bytes(b.param_data for b in buffers) + frozen,
        "gradients": storage_bytes(b.grad_data for b in buffers),
        "optimizer": sum(t.numel() * t.element_size() for t in [*main, *moments]),
        "teacher": sum(t.numel() * t.element_size() for t in model.teacher.shards.values())
        + storage_bytes(model.teacher_model.parameters())
        - frozen,
    }
    return {"stage": number, "formulas": result, "real": real, "megatron": megatron.bf16}


LAYOUTS = {
    "one process, float32": (1, {}, ()),
    "tensor 2, sequence, bf16": (2, {}, ("parallel.tensor=2", "parallel.sequence=true", "precision.dtype=bf16")),
    "pipeline 2, tied": (2, {"tie_word_embeddings": True}, ("parallel.pipeline=2",)),
    "layers recomputed": (1, {}, ("trainer.recompute=layers", "trainer.recompute_vision=true")),
    "feed-forward recomputed, pipeline 2": (2, {}, ("parallel.pipeline=2", "trainer.recompute=mlp")),
    "data 2, bf16, tower frozen": (2, {}, ("precision.dtype=bf16", "model.freeze.vision=true")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_by_kind_are_those_of_a_real_model(name, assets, tmp_path):
    world_size, sizes, overrides = LAYOUTS[name]
    write_tiny_model(tmp_path / "model", seed=1, **SIZES, **sizes)
    config = tiny_config(
        assets,
        tmp_path / "run",
        f"model.hf_path={tmp_path / 'model'}",
        "data.batch_size=8",
        "rollout.max_batch_tokens=100000",
        "trainer.max_tokens_per_microbatch=256",
        *overrides,
    )
    stages = run_distributed(count, 1, config, world_size)[0]
    ranks = run_distributed(measure, world_size, config)
    from nemo_vopd.tools.planning.memory import fixed_bytes

    class Megatron:
        bf16 = ranks[0]["megatron"]

    for number, stage in enumerate(stages):
        here = [rank["real"] for rank in ranks if rank["stage"] == number]
        planned = fixed_bytes(stage, Megatron, config.distill.teacher.kind)  # type: ignore[arg-type]
        # the data-parallel rank that owns the most
        assert planned == {kind: max(real[kind] for real in here) for kind in planned}
    for rank in ranks:
        planned, real = rank["formulas"]["kv_cache"]
        assert real == planned
        planned, real = rank["formulas"]["activations"]
        assert planned == pytest.approx(real, rel=0.1), f"{name}, stage {rank['stage']}"


def shipped(name: str, *overrides: str) -> PlanConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return PlanConfig(**vars(from_hydra(compose(name, overrides=list(overrides)))))


def plans(cases: list[tuple[str, tuple[str, ...]]]) -> list[dict]:
    from nemo_vopd.errors import OptionError
    from nemo_vopd.tools.planning.plan import Plan, divide_remedy, plan_json, plan_text, refusal_json, remedy_for

    results = []
    for name, overrides in cases:
        config = shipped(name, *overrides)
        try:
            plan = Plan(config)
        except OptionError as error:
            results.append(refusal_json(config, divide_remedy(error, config)))
            continue
        assert "fullest phase" in plan_text(plan)
        results.append(plan_json(plan, None if plan.fits else remedy_for(plan)))
    return results


def test_every_shipped_run_fits_and_has_the_published_size():
    documented = (ROOT / "docs/parallelism.md").read_text().splitlines()
    published = {"3b": 3.75, "7b": 8.29, "32b": 33.45, "72b": 73.41}
    for name, plan in zip(SHIPPED, run_distributed(plans, 1, [(name, ()) for name in SHIPPED])[0], strict=True):
        assert plan["fits"] and plan["remedy"] is None, f"{name}: {plan['remedy']}"
        assert plan["parameters"]["total"] == pytest.approx(1e9 * published[name.split("_")[1]], rel=0.005)
        assert all(stage["total_bytes"] <= 79.1 * 2**30 for stage in plan["stages"])
        assert plan["step_seconds"] > 0 and plan["gpu_hours"] > 0
        row = next(line for line in documented if line.startswith(f"| `{name}` |"))
        fullest = max(stage["total_bytes"] for stage in plan["stages"]) / 2**30
        assert row.endswith(f" {fullest:.1f} | {plan['step_seconds']:.0f} | {plan['gpu_hours']:.0f} |")
        assert 0.1 < plan["flops"]["total"] / (plan["step_seconds"] * plan["world_size"] * 989e12) < 0.4
    assert len(SHIPPED) == 5


def test_every_documented_training_command_passes_the_plan():
    """On the number of GPUs that it says; the tiny run's commands run in other tests."""
    text = "".join(page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    text = text.replace("\\\n", " ")
    named = r"(?:train_vopd\.py|train|--) --config-name (train\w*)(?=\s)([^\n`|]*)"
    cases = []
    for name, rest in re.findall(named, text):
        words = [word for word in rest.split() if "=" in word]
        # neither the model nor the data are here, and the configuration names the published size
        overrides = tuple(w for w in words if not w.startswith(("model.hf_path=", "data.path=", "exp_manager.")))
        cases.append((name, overrides))
    assert {name for name, _ in cases} >= {"train_7b", "train_72b"} and "train" not in dict(cases), cases
    for case, plan in zip(cases, run_distributed(plans, 1, cases)[0], strict=True):
        assert plan["fits"], (case, plan["remedy"])


def test_a_model_directory_wins_over_the_published_architecture(assets):
    (plan,) = run_distributed(plans, 1, [("train_3b", (f"model.hf_path={assets / 'tiny-vlm'}",))])[0]
    assert plan["parameters"]["total"] < 1e6 and plan["fits"]


def test_remedies_are_changes_that_work():
    tight = ("train_7b", ("trainer.max_tokens_per_microbatch=24576",))
    tower = ("train_72b", ("num_nodes=4", "trainer.max_tokens_per_microbatch=2560", "trainer.recompute_vision=false"))
    few_nodes = ("train_72b", ("num_nodes=3", "parallel.pipeline=3", "parallel.pipeline_layout=[22,29,29]"))
    one_node = ("train_72b", ("num_nodes=1",))
    uneven_batch = ("train_72b", ("data.batch_size=97",))
    layers = ("train_72b", ("parallel.pipeline_layout=null", "parallel.pipeline=3", "num_nodes=3"))
    cases = [tight, tower, few_nodes, one_node, uneven_batch, layers]
    tight_plan, towering, few, one, uneven, third = run_distributed(plans, 1, cases)[0]
    assert not any(plan["fits"] for plan in (tight_plan, towering, few, one, uneven, third))
    assert (
        tight_plan["remedy"].startswith("does not fit: pipeline stage 0 needs")
        and "trainer.max_tokens_per_microbatch=" in tight_plan["remedy"]
    )
    assert towering["remedy"].endswith("GiB in the student phase; set trainer.recompute_vision=true")
    assert few["remedy"].endswith("set num_nodes=6") and few["stages"]
    assert one["remedy"].startswith("num_nodes=1: 8 GPUs") and one["remedy"].endswith("set num_nodes=8")
    assert "data.batch_size=97: must be divisible by the data-parallel size 2; set it to 96 or 98" == uneven["remedy"]
    assert "parallel.pipeline_layout=[" in third["remedy"]
    assert all("\n" not in plan["remedy"] for plan in (tight_plan, few, one, uneven, third))
    # what the remedy of the first says, done
    budget = tight_plan["remedy"].split("set ")[1]
    assert run_distributed(plans, 1, [("train_7b", (budget,))])[0][0]["fits"]


def test_one_forward_one_backward_keeps_as_many_microbatches_as_stages_follow():
    from nemo_vopd.tools.planning.memory import most_alive

    for stages, stage, num in ((4, 0, 16), (4, 3, 16), (4, 0, 2), (1, 0, 5)):
        assert most_alive(num, stages, stage, [10]) == 10 * min(stages - stage, num)
    # interleaved, two chunks, first of three stages: 4 + 3 warm-up passes and the one before the first backward
    assert most_alive(9, 3, 0, [1, 1]) == 8


def test_the_command_line():
    commands = [
        ("--json", "--config-name", "train_72b", "num_nodes=4", "gpu=h200", "assume.response_tokens=300"),
        ("--config-name", "train_72b", "num_nodes=1"),
        ("--config-name", "train_72b", "gpus=4"),
        ("--config-name", "train_72b", "gpu=h1"),
        ("--config-name", "train_72b", "gpus_per_node=many", "--json"),
        ("--config-name", "train_72b", "assume.efficiency=1.5"),
    ]
    h200, one_node, unknown, wrong_gpu, wrong_type, unlikely = (
        run_recipe("recipes/plan.py", *line) for line in commands
    )
    assert h200.returncode == 0, h200.stderr[-3000:]
    plan = json.loads(h200.stdout)
    keys = "parameters stages gpu world_size layout batch flops step_seconds gpu_hours assumptions fits remedy".split()
    assert set(keys) <= set(plan) and plan["fits"] and plan["world_size"] == 32 and "H200" in plan["gpu"]["name"]
    assert plan["assumptions"]["response_tokens"] == 300 and plan["layout"]["data"] == 1
    assert one_node.returncode == 1 and one_node.stderr.strip().splitlines()[-1].startswith(
        "error: num_nodes=1: 8 GPUs"
    )
    assert "set num_nodes=8" in one_node.stderr
    for done, what in (
        (unknown, "gpus=4: no such option"),
        (wrong_gpu, "gpu=h1: must be one of"),
        (wrong_type, "many"),
        (unlikely, "assume.efficiency=1.5: must lie in (0, 1]; set it to 0.35"),
    ):
        assert done.returncode == 2 and what in done.stderr and not done.stdout, done.stderr[-2000:]
