"""The shape law of microbatches and the token budget that counts both views."""

import torch

from nemo_vopd.batch import Rollout, Sample, View, collate, split_by_token_budget


def make_view(length: int, jump: int = 0) -> View:
    """A prompt of `length` tokens whose last position is `length` - 1 + `jump`, as after an image."""
    positions = torch.arange(length).expand(3, length).clone()
    positions[:, -1] += jump
    return View(torch.arange(10, 10 + length), positions, torch.zeros(0, 4), torch.zeros(0, 3, dtype=torch.int64))


def make_rollout(student: int, teacher: int, response: int, name: str = "s") -> Rollout:
    sample = Sample(name, make_view(student), make_view(teacher, jump=5), "?")
    return Rollout(sample, torch.arange(100, 100 + response), -torch.rand(response))


def test_rows_predict_the_response_in_each_view():
    rollouts = [make_rollout(4, 7, 3), make_rollout(6, 2, 2), make_rollout(3, 3, 0)]
    for views in ([r.sample.student for r in rollouts], [r.sample.teacher for r in rollouts]):
        batch = collate(rollouts, views, pad_token_id=0, pad_multiple=4)
        b, s = batch.token_ids.shape
        assert (
            s % 4 == 0
            and s - 4 < max(v.num_tokens + r.token_ids.numel() for v, r in zip(views, rollouts, strict=True)) <= s
        )
        # row t of the hidden states [s, b, H] stands one position before the token it predicts
        position, sequence = batch.response_rows // b, batch.response_rows % b
        assert torch.equal(batch.token_ids[sequence, position + 1], batch.response_tokens)
        assert batch.response_tokens.tolist() == [100, 101, 102, 100, 101]
        for i, (view, rollout) in enumerate(zip(views, rollouts, strict=True)):
            p, r = view.num_tokens, rollout.token_ids.numel()
            assert torch.equal(batch.token_ids[i, :p], view.token_ids) and not batch.token_ids[i, p + r :].any()
            after = view.position_ids.max() + 1 + torch.arange(r)
            assert torch.equal(batch.position_ids[:, i, p : p + r], after.expand(3, r))


def test_both_views_and_the_response_count_against_the_budget():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60, (40, 3), generator=generator).tolist()
    rollouts = [make_rollout(*size, name=str(i)) for i, size in enumerate(sizes)]
    groups = split_by_token_budget(rollouts, 200)
    assert sorted(r.sample.id for g in groups for r in g) == sorted(r.sample.id for r in rollouts)
    assert len(groups) < len(rollouts)
    for group in groups:
        for views in ([r.sample.student for r in group], [r.sample.teacher for r in group]):
            assert collate(group, views, 0).token_ids.numel() <= 200


def test_the_budget_is_used_up_and_an_overlong_rollout_stands_alone():
    assert [len(g) for g in split_by_token_budget([make_rollout(4, 6, 4) for _ in range(4)], 20)] == [2, 2]
    groups = split_by_token_budget([make_rollout(4, 50, 4), make_rollout(4, 6, 4)], 20)
    assert [len(g) for g in groups] == [1, 1]


def test_patches_wait_in_host_memory_until_their_microbatch_runs():
    rollout = make_rollout(student=4, teacher=6, response=3)
    batch = collate([rollout], [rollout.sample.student], pad_token_id=0)
    moved = batch.to(torch.device("meta"))
    assert moved.pixel_values is batch.pixel_values
    assert all(value.is_meta for name, value in vars(moved).items() if name != "pixel_values")
