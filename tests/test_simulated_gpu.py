"""Training, resuming and answering on a simulated GPU: no tensor on the wrong side, the CPU's numbers."""

from __future__ import annotations

import operator
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.helpers import tiny_config
from tests.test_step import LAYOUTS
from tests.training.test_resume import configure, numbers, same, train_until
from tests.vlm.tiny_qwen3_vl import write_tiny_qwen3_vl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is better: pytest -m gpu tests/gpu")


def on_gpu(function, *args):
    """`function(*args)` in a process with a simulated GPU, and how often its host waited, by line."""
    from tests import simulated_gpu

    simulated_gpu.activate()
    return function(*args), dict(simulated_gpu.waits)


def refused():
    """Names of what is refused among operations of which all but the last would fail on a GPU."""
    from tests.simulated_gpu import WrongDevice

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    on, off = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
    index, generator = torch.arange(3), torch.Generator()
    assert on.is_cuda and not off.is_cuda and on[0].device == torch.device("cuda", 0) and on.cpu().device.type == "cpu"
    assert torch.nn.Linear(3, 3).to("cuda").weight.is_cuda and torch.zeros_like(on).is_cuda
    cases = {
        "sum": lambda: on + off,
        "product": lambda: on @ off,
        "cat": lambda: torch.cat([on, off]),
        "gather": lambda: on.gather(0, index[:, None]),
        "a GPU's index": lambda: off[index.cuda()],
        "linear": lambda: torch.nn.functional.linear(on, off),
        "backward": lambda: (on.requires_grad_() * 2).sum().backward(torch.ones(1)[0].cuda() + off),
        "numpy": lambda: on.detach().numpy(),
        "generator": lambda: on.detach().normal_(generator=generator),
        "made with a generator": lambda: torch.randn(3, device="cuda", generator=generator),
        "collective": lambda: dist.all_reduce(off),
        "allowed": lambda: (
            on + 1 + off[0, 0],
            on.detach()[index],
            off.copy_(on.detach()),
            dist.all_reduce(on.detach()),
            dist.all_gather_object([None], off),
            torch.randn(3, device="cuda", generator=torch.Generator("cuda")),
        ),
    }
    names = []
    for name, case in cases.items():
        try:
            case()
        except WrongDevice:
            names.append(name)
    return list(cases), names


def test_what_a_gpu_refuses_is_refused():
    (((cases, names), _),) = run_distributed(on_gpu, 1, refused)
    assert names == cases[:-1]


def only_one_gpu():
    from nemo_vopd.config import ParallelConfig
    from nemo_vopd.errors import OptionError
    from nemo_vopd.mcore import parallel

    torch.cuda.device_count = lambda: 1
    os.environ["LOCAL_RANK"] = "1"
    try:
        parallel.initialize(ParallelConfig(), seed=1)
    except OptionError as error:
        return str(error)


def test_a_process_that_does_not_see_its_gpu_says_so():
    ((second, _),) = run_distributed(on_gpu, 1, only_one_gpu)
    assert second.startswith("CUDA_VISIBLE_DEVICES=not set: shows 1 GPU to process 1 of this node")


WAITS = {
    "nemo_vopd/training/metrics.py": "the clock of a phase, the numbers of a step",
    "nemo_vopd/rollout/native/batching.py": "the tokens of a step of decoding",
    "nemo_vopd/distill/divergence.py": "whether a chunk has ties at its top-k",
    "nemo_vopd/training/stopping.py": "the numbers of a step",
    "core/distributed/finalize_model_grads.py": "the number of tokens",
    "core/optimizer/clip_grads.py": "the gradient's norm",
    "core/pipeline_parallel/p2p_communication.py": "the length of a microbatch, from the stage before",
}
"""What the host waits for the device for in a step, once for each step, phase, token or chunk; never in a layer."""

COPIES = {
    "nemo_vopd/vlm/build.py": "the model",
    "nemo_vopd/vlm/weights/reading.py": "the model",
    "nemo_vopd/batch.py": "a microbatch",
    "nemo_vopd/mcore/pipeline_passes.py": "its patches",
    "nemo_vopd/vlm/qwen2_5_vl.py": "the windows of its images",
    "nemo_vopd/rollout/native/stage.py": "what is never drawn, once for all prompts of a step",
    "nemo_vopd/rollout/native/batching.py": "new prompts, and which rows there are when some have ended",
    "nemo_vopd/rollout/native/cache.py": "new prompts, and which rows there are when some have ended",
    "nemo_vopd/training/metrics.py": "the numbers of a step",
    "nemo_vopd/training/stopping.py": "the numbers of a step",
}
"""What our code copies from host memory to the device, a wait, too; never in a layer, at a token or for a chunk."""


def check_waits(waits):
    """Allow what WAITS and COPIES name, and while decoding one wait a token."""
    files = {(line.partition(":")[0], line.endswith("from the CPU")) for line in waits}
    others = "fabric/utilities/", "pytorch/utilities/", "nemo_vopd/tools/"  # Lightning's logger; after the run
    assert {file for file, copy in files if not copy and not file.startswith(others)} <= set(WAITS)
    copying = {file for file, copy in files if copy and file.startswith("nemo_vopd/") and not file.startswith(others)}
    assert copying <= set(COPIES)
    decoding = ((n, line) for line, n in waits.items() if line.startswith("nemo_vopd/rollout/"))
    (tokens, line), *rarer = sorted(decoding, reverse=True)
    assert line.startswith("nemo_vopd/rollout/native/batching.py") and line.endswith("tolist")
    assert not [line for n, line in rarer if n > tokens / 2]


def fit(config):
    from nemo_vopd.tools.during_training import GapDuringTraining
    from nemo_vopd.training.run import train

    train(config, evaluation=GapDuringTraining(config))


@pytest.mark.parametrize("name", ["111", "221 sequence small", "131 small", "122 small"])
def test_a_run_equals_that_on_the_cpu(name, assets, tmp_path):
    """Metrics to the last bit; examples are made after the run, when Lightning has let go of the model."""
    world_size, overrides = LAYOUTS[name]
    measured = [f"evaluation.path={assets}/tiny-digits", "evaluation.every_n_steps=1", "evaluation.num_samples=8"]
    options = ["trainer.max_steps=2", *measured, *overrides]
    run_distributed(fit, world_size, tiny_config(assets, tmp_path / "cpu", *options))
    ranks = run_distributed(on_gpu, world_size, fit, tiny_config(assets, tmp_path / "gpu", *options))
    assert numbers(tmp_path / "gpu") == numbers(tmp_path / "cpu") and len(numbers(tmp_path / "gpu")) == 2
    for file in ("evaluations.jsonl", "examples.json"):
        assert (tmp_path / "gpu" / file).read_text() == (tmp_path / "cpu" / file).read_text()
    for _, waits in ranks:
        check_waits(waits)


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=bf16", "distill.top_k=null", "rollout.temperature=0.7", "rollout.top_p=0.9"],
        ["distill.teacher.kind=trust_region", "distill.teacher.mix=0.3", "trainer.recompute=mlp"],
        ["distill.teacher.offload=true", "trainer.recompute=layers", "trainer.recompute_vision=true"],
        ["model=qwen3", "distill.teacher.kind=current", "distill.importance.max_weight=2"],
    ],
    ids=["bf16, whole vocabulary", "trust region", "offload, recompute", "qwen3"],
)
def test_options(overrides, assets, tmp_path):
    """bf16 is near the CPU only: a GPU's products of the loss are not rounded in between."""
    if "model=qwen3" in overrides:
        model = write_tiny_qwen3_vl(tmp_path / "qwen3", assets / "tiny-vlm", layers=2)
        overrides = [f"model.hf_path={model}", *overrides[1:]]
    options = ["trainer.max_steps=2", *overrides]
    run_distributed(fit, 1, tiny_config(assets, tmp_path / "cpu", *options))
    run_distributed(on_gpu, 1, fit, tiny_config(assets, tmp_path / "gpu", *options))
    cpu, gpu = numbers(tmp_path / "cpu"), numbers(tmp_path / "gpu")
    if "precision=bf16" not in overrides:
        assert gpu == cpu
    else:
        assert gpu[0]["loss"] == pytest.approx(cpu[0]["loss"], rel=0.05)
        assert gpu[0]["mismatch_max"] < 0.1


def test_resumed_equals_uninterrupted(assets, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["precision=bf16", "checkpoint.asynchronous=true", "checkpoint.every_n_steps=2"]
    ((expected, _),) = run_distributed(on_gpu, 1, train_until, configure(assets, one, *options), None)
    run_distributed(on_gpu, 1, train_until, configure(assets, two, *options), 3)
    ((resumed, _),) = run_distributed(on_gpu, 1, train_until, configure(assets, two, *options), None)
    assert numbers(one) == numbers(two) and len(numbers(one)) == 6 and same(expected, resumed)


def bf16_loss(device):
    """Loss and its gradients of bf16 tensors on `device`, added to float32, and the same in float64."""
    from nemo_vopd.distill.fused import LossOptions, Policy, fused_linear_jsd

    generator = torch.Generator().manual_seed(0)
    shapes = (40, 32), (300, 32), (40, 32), (300, 32)
    tensors = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    results = []
    for dtype, where in ((torch.bfloat16, device), (torch.float64, "cpu")):
        hidden, weight, *teacher = (tensor.detach().clone().to(where, dtype) for tensor in tensors)
        into = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
        options = LossOptions(alpha=0.5, top_k=20, add_tail=True, chunk_tokens=8)
        hidden.requires_grad_(), weight.requires_grad_()
        policies, ones = (Policy(hidden, weight), Policy(*teacher)), torch.ones(40, device=where)
        loss, _ = fused_linear_jsd(*policies, ones, options, weight_grad_into=into)
        loss.backward()
        results.append([x.detach().cpu().double() for x in (loss, hidden.grad, into)])
    return [((ours - exact).norm() / exact.norm()).item() for ours, exact in zip(*results, strict=True)]


def test_a_gpu_rounds_less_in_the_loss():
    """Logits are never bf16, nor is a chunk's part of the gradient of the head."""
    ((gpu, _),), (cpu,) = run_distributed(on_gpu, 1, bf16_loss, "cuda"), run_distributed(bf16_loss, 1, "cpu")
    assert gpu[0] < 1e-6 and gpu[1] < 2**-8 and gpu[2] < 2**-8
    assert gpu[0] < cpu[0] / 100 and gpu[2] < cpu[2]


def there_and_back(config, checkpoint: Path, folder: Path, image: Path):
    """Export, answer, import; the answer."""
    from nemo_vopd.tools.convert import export_checkpoint, import_model
    from nemo_vopd.tools.generate import generate

    export_checkpoint(config, checkpoint, "student", folder / "exported")
    config.model.hf_path = str(folder / "exported")
    answer = generate(config, image, "which digit is white?", 5, 0.0)
    import_model(config, folder / "imported")
    return answer


def test_convert_and_generate(assets, tmp_path):
    from PIL import Image

    Image.new("RGB", (80, 60), "white").save(tmp_path / "image.png")
    config = tiny_config(assets, tmp_path / "run", "trainer.max_steps=1", "checkpoint.every_n_steps=1")
    run_distributed(on_gpu, 1, fit, config)
    arguments = tmp_path / "run" / "checkpoints" / "last", tmp_path, tmp_path / "image.png"
    ((on, _),) = run_distributed(on_gpu, 1, there_and_back, config, *arguments)
    (tmp_path / "exported").rename(tmp_path / "exported on a GPU")
    (tmp_path / "imported").rename(tmp_path / "imported on a GPU")
    (off,) = run_distributed(there_and_back, 1, config, *arguments)
    assert on == off and len(on["token_ids"]) > 0
    files = [tmp_path / name / "model.safetensors" for name in ("exported", "exported on a GPU")]
    assert operator.eq(*(file.read_bytes() for file in files))
