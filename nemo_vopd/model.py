"""Vision-OPD as a NeMo model: `training_step` is the algorithm (arXiv 2605.18740), everything else serves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from megatron.core.process_groups_config import ProcessGroupCollection
from nemo.core import ModelPT
from nemo.utils import logging
from omegaconf import OmegaConf
from torch import Tensor

from nemo_vopd.batch import MicroBatch, PromptBatch, Rollout, Sample, blank_rollout, collate, split_by_token_budget
from nemo_vopd.config import Config
from nemo_vopd.data.processor import Processor
from nemo_vopd.data.task_encoder import build_train_loader
from nemo_vopd.distill.fused import fused_linear_jsd
from nemo_vopd.distill.teacher import Teacher
from nemo_vopd.errors import OptionError
from nemo_vopd.evaluation.gap import load_answered, measure_gap
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.mcore.optimizer import Optimizer, OptimizerFacade, learning_rate, wrap_ddp
from nemo_vopd.mcore.schedule import student_pass, teacher_pass
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.mcore.weights import ShardedWeights
from nemo_vopd.rollout.engine import RolloutEngine, SamplingParams
from nemo_vopd.rollout.megatron import Decoder, MegatronEngine
from nemo_vopd.rollout.replay import ReplayEngine, dump, to_record
from nemo_vopd.runtime.metrics import MetricsFile, Timers
from nemo_vopd.vlm import build_vlm


class VisionOPDModel(ModelPT):
    """Student, teacher, optimizer and rollout engine of one rank, and the step that moves them."""

    def __init__(self, config: Config, groups: ProcessGroupCollection, trainer: Trainer | None = None) -> None:
        """Build everything from `config`; weights come from `config.model.hf_path`."""
        # ModelPT refuses a top-level key named model, so the run's configuration sits one level down
        super().__init__(OmegaConf.create({"run": dataclasses.asdict(config)}), trainer)  # type: ignore[arg-type]
        self.automatic_optimization = False
        self.config, self.groups = config, groups
        self.processor = Processor.from_pretrained(config.model.hf_path)
        _check_support(config, self.processor.vocab_size)

        self.student = build_vlm(config, groups)
        self.student_ddp = wrap_ddp(self.student.chunks, groups)
        self.student_optimizer = Optimizer(
            self.student_ddp, config.optimizer, groups, bf16=config.precision.dtype == "bf16"
        )
        self.teacher_model, self.teacher = self._build_teacher()
        self.engine = self._build_engine()
        self.timers = Timers()
        self.metrics_file: MetricsFile | None = None
        self.evaluation_file: MetricsFile | None = None
        self._evaluation_samples: list[Sample] | None = None
        self._reasons_told: set[str] = set()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One optimizer step on the prompts of `batch`: roll out, score twice, pull the student to the teacher."""
        step = self.trainer.global_step

        # 1. The student answers from the full image (on-policy).
        with self.timers("rollout"):
            rollouts = self.engine.generate(batch.samples, step)
            self._dump(rollouts, step)
            rollouts, num_dropped = self._drop_unusable(rollouts)
        students, teachers = self._microbatches(rollouts)

        # 2. The teacher reads the same responses beside the crop; only hidden states of response rows are kept.
        with self.timers("teacher"):
            teacher_hidden = teacher_pass(
                self.teacher_model, teachers, self.groups, self.config.distill.teacher.offload
            )

        # 3. The student reads them beside the full image; the loss pulls it to the teacher, token by token.
        with self.timers("student"):
            self.student_optimizer.zero_grad()
            loss = self._loss(students, teacher_hidden)
            statistics = student_pass(self.student, self.student_ddp, students, loss, self.groups)
        metrics = self._reduce(statistics, len(rollouts), len(batch.dropped), num_dropped)

        # 4. The student moves, then the teacher follows; without a token or a finite gradient neither does.
        with self.timers("optimizer"):
            lr = learning_rate(step, self.config.optimizer, self.config.trainer.max_steps)
            updated, grad_norm = self.student_optimizer.step(lr) if metrics["num_response_tokens"] else (False, 0.0)
            if updated:
                self.teacher.update(step)
                self.engine.sync_weights()
            self.optimizers().step()  # type: ignore[union-attr]  # Lightning counts the step

        self._warn_of_dropped(batch)
        self._report(
            {"step": step, **metrics, "grad_norm": grad_norm, "lr": lr, "num_skipped_updates": int(not updated)}
        )

    def _loss(self, students: list[MicroBatch], teacher_hidden: list[Tensor]):
        """The loss function of `student_pass`: divergence sum, token count and statistics of one microbatch."""
        distill = self.config.distill

        def loss(hidden: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
            batch, weight = students[index], self.student.output_weight()
            loss_sum, stats = fused_linear_jsd(
                hidden,
                weight,
                teacher_hidden[index].to(hidden.device),
                self.teacher_model.output_weight(),
                torch.ones_like(batch.rollout_log_probs),
                alpha=distill.alpha,
                top_k=distill.top_k,
                add_tail=distill.add_tail,
                temperature=self.config.rollout.temperature,
                chunk_tokens=distill.chunk_tokens,
                tp_group=self.groups.tp,
                tokens=batch.response_tokens,
                rollout_log_probs=batch.rollout_log_probs,
                max_importance_weight=distill.importance.max_weight,
                teacher_mix=distill.teacher.mix if distill.teacher.kind == "trust_region" else 0.0,
                weight_grad_into=weight.main_grad,  # type: ignore[attr-defined]
            )
            num_tokens = torch.tensor(len(batch.response_tokens), dtype=torch.int, device=hidden.device)
            sums = torch.cat([torch.stack([loss_sum.detach().float(), num_tokens.float()]), stats.sums()])
            return loss_sum, num_tokens, sums

        return loss

    def _microbatches(self, rollouts: list[Rollout]) -> tuple[list[MicroBatch], list[MicroBatch]]:
        """Student and teacher microbatches over the same responses, both within the token budget."""
        if not rollouts:  # this rank has nothing to learn from, but takes part in the collectives
            rollouts = [blank_rollout(self.processor.pad_token_id)]
        pad_multiple = self.config.parallel.tensor if self.config.parallel.sequence else 1
        device, pad = cpu.device(), self.processor.pad_token_id
        students, teachers = [], []
        packed = split_by_token_budget(rollouts, self.config.trainer.max_tokens_per_microbatch)
        if self.config.parallel.virtual_pipeline > 1:  # the interleaved schedule takes whole rounds of the pipeline
            packed += [[blank_rollout(pad)]] * (-len(packed) % self.config.parallel.pipeline)
        for group in packed:
            students.append(collate(group, [r.sample.student for r in group], pad, pad_multiple).to(device))
            teachers.append(collate(group, [r.sample.teacher for r in group], pad, pad_multiple).to(device))
        return students, teachers

    def _drop_unusable(self, rollouts: list[Rollout]) -> tuple[list[Rollout], int]:
        """Rollouts without image or video ids, which could not be scored, and the number of the others."""
        forbidden = torch.tensor(self.processor.forbidden_token_ids)
        kept = [rollout for rollout in rollouts if not torch.isin(rollout.token_ids, forbidden).any()]
        return kept, len(rollouts) - len(kept)

    def _dump(self, rollouts: list[Rollout], step: int) -> None:
        """Write the rollouts of all data-parallel ranks when `rollout.dump_path` asks for it."""
        path = self.config.rollout.dump_path
        if path is None:
            return
        dp = self.groups.dp_cp
        gathered: list = [None] * dp.size()
        dist.all_gather_object(gathered, [to_record(rollout) for rollout in rollouts], group=dp)
        if parallel.is_rank_zero():
            dump(path, [record for records in gathered for record in records], step)

    def _reduce(
        self, statistics: list[Tensor], num_responses: int, num_dropped_samples: int, num_dropped_responses: int
    ) -> dict[str, float]:
        """Sum statistics and counts of this step over all ranks, once, and turn them into means over tokens."""
        sums = torch.zeros(_NUM_SUMS + 3, dtype=torch.float64, device=cpu.device())
        if parallel.is_last_stage(self.groups):  # the other stages have no statistics and would count twice
            sums[:_NUM_SUMS] = torch.stack(statistics).double().sum(0)
            sums[_NUM_SUMS:] = torch.tensor([num_responses, num_dropped_samples, num_dropped_responses])
        dist.all_reduce(sums, group=self.groups.dp_cp)
        dist.all_reduce(sums, group=self.groups.pp)
        loss, tokens, divergence, _, importance, entropy, student_mass, teacher_mass, *counts = sums.tolist()
        num = max(tokens, 1.0)
        return {
            "loss": loss / num,
            "num_response_tokens": int(tokens),
            "num_responses": int(counts[0]),
            "num_dropped_samples": int(counts[1]),
            "num_dropped_responses": int(counts[2]),
            "mean_response_length": tokens / max(counts[0], 1.0),
            "divergence": divergence / num,
            "teacher_topk_mass": teacher_mass / num,
            "student_topk_mass": student_mass / num,
            "importance_weight_mean": importance / num,
            "entropy": entropy / num,
        }

    def _report(self, metrics: dict[str, float]) -> None:
        """Write metrics.jsonl, TensorBoard and the progress line."""
        seconds = self.timers.pop()
        metrics = {**metrics, **seconds, "tokens_per_second": metrics["num_response_tokens"] / seconds["seconds_step"]}
        if self.metrics_file is not None:
            self.metrics_file.write(metrics)
        for name, value in metrics.items():
            shown = name in ("loss", "mean_response_length", "tokens_per_second")
            self.log(name, float(value), prog_bar=shown, rank_zero_only=True)

    def _warn_of_dropped(self, batch: PromptBatch) -> None:
        """Say once for each reason that, and which, a record cannot be used; metrics count all of them."""
        for sample in batch.dropped:
            if sample.reason not in self._reasons_told:
                self._reasons_told.add(sample.reason)
                logging.warning("dropped sample %s: %s (%s)", sample.id, sample.reason, sample.detail)

    def _build_teacher(self) -> tuple[Stage, Teacher]:
        """The module that scores the crop view and the rule by which its weights follow."""
        options = self.config.distill.teacher
        if options.kind == "current":  # the live weights, read without gradient: no second copy
            return self.student, Teacher(options, {}, lambda shards: None)
        teacher_model = build_vlm(self.config, self.groups).eval()
        weights = ShardedWeights(teacher_model, self.student, self.student_optimizer, self.groups)
        main = {name: shard for name, (shard, _) in weights.main.items()}
        return teacher_model, Teacher(options, main, weights.publish)

    def _build_engine(self) -> RolloutEngine:
        rollout = self.config.rollout
        if rollout.engine == "replay":
            assert rollout.path is not None  # validated
            return ReplayEngine(rollout.path, rollout.n)
        return MegatronEngine(
            self.student,
            self.groups,
            self.sampling_params(),
            pad_token_id=self.processor.pad_token_id,
            max_batch_tokens=rollout.max_batch_tokens,
        )

    def sampling_params(self) -> SamplingParams:
        """How the student samples: the rollout options and the model's special tokens."""
        rollout = self.config.rollout
        return SamplingParams(
            n=rollout.n,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_response_length=rollout.max_response_length,
            end_token_ids=tuple(self.processor.end_token_ids),
            forbidden_token_ids=tuple(self.processor.forbidden_token_ids),
            seed=self.config.seed,
        )

    def train_dataloader(self) -> Iterator[PromptBatch]:
        """This data-parallel rank's prompts of each global batch, without end."""
        dp = self.groups.dp_cp
        loader = build_train_loader(
            self.config.data,
            self.config.distill.teacher_view,
            self.processor,
            seed=self.config.seed,
            dp_rank=dp.rank(),
            dp_size=dp.size(),
        )
        # an iterator has no length: Lightning would end an epoch, and restart the loader, after each pass
        return iter(loader)

    def on_train_start(self) -> None:
        """Open the metrics file on rank 0, from the step the run starts at."""
        super().on_train_start()
        folder = Path(self.config.exp_manager["exp_dir"])
        if parallel.is_rank_zero():
            self.metrics_file = MetricsFile(folder / "metrics.jsonl", self.trainer.global_step)
            self.evaluation_file = MetricsFile(folder / "evaluations.jsonl", self.trainer.global_step)
        self.timers = Timers()

        self._evaluate(self.trainer.global_step)

    def on_train_batch_end(self, outputs, batch, batch_idx: int, unused: int = 0) -> None:
        """Measure accuracy on both views where `evaluation.every_n_steps` asks for it."""
        super().on_train_batch_end(outputs, batch, batch_idx, unused)
        self._evaluate(self.trainer.global_step)

    def _evaluate(self, step: int) -> None:
        options = self.config.evaluation
        if not options.every_n_steps or options.path is None or step % options.every_n_steps:
            return
        if self._evaluation_samples is None:
            self._evaluation_samples = load_answered(
                options.path, self.config.data, self.processor, options.num_samples, option="evaluation.path"
            )
        rollout = self.config.rollout
        decoder = Decoder(self.student, self.groups, self.processor.pad_token_id, rollout.max_batch_tokens)
        gap = measure_gap(decoder, self.processor, self._evaluation_samples, self.groups, rollout.max_response_length)
        if self.evaluation_file is not None:
            accuracies = {"full_accuracy": gap.full_accuracy, "crop_accuracy": gap.crop_accuracy}
            self.evaluation_file.write({"step": step, **accuracies})
        self.timers.pop()  # evaluation is not part of the next step

    def configure_optimizers(self):
        """Lightning gets a facade that counts; Megatron's optimizer does the work."""
        return OptimizerFacade()

    def transfer_batch_to_device(self, batch, device, dataloader_idx: int):
        """Prompts stay on the CPU until they are packed into microbatches."""
        return batch

    def setup_training_data(self, train_data_config=None) -> None:
        """Required by ModelPT; the loader is built by `train_dataloader`."""

    def setup_validation_data(self, val_data_config=None) -> None:
        """Required by ModelPT; accuracy is measured by recipes/evaluate.py."""

    @classmethod
    def list_available_models(cls):
        """Required by ModelPT: there are no pretrained models to list."""
        return []


_NUM_SUMS = 8
"""Loss, tokens and the six fields of TokenStats."""


def _check_support(config: Config, vocab_size: int) -> None:
    top_k = config.distill.top_k
    if top_k is not None and top_k > vocab_size:
        rule = f"must not exceed the vocabulary size, {vocab_size}"
        raise OptionError("distill.top_k", top_k, rule, "lower it or set distill.top_k=null for the full vocabulary")
