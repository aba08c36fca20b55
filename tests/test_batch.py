"""The shape law of microbatches and the token budget that counts both views."""

import torch

from nemo_vopd.batch import RecordKey, Rollout, Sample, View, collate, split_by_token_budget


def make_view(length: int, jump: int = 0) -> View:
    """A prompt of `length` tokens whose last position is `length` - 1 + `jump`, as after an image."""
    positions = torch.arange(length).expand(3, length).clone()
    positions[:, -1] += jump
    return View(torch.arange(10, 10 + length), positions, torch.zeros(0, 4), torch.zeros(0, 3, dtype=torch.int64))


def make_rollout(student: int, teacher: int, response: int, name: str = "s") -> Rollout:
    sample = Sample(name, RecordKey(0, 0), make_view(student), make_view(teacher, jump=5), "?")
    return Rollout(sample, torch.arange(100, 100 + response), -torch.rand(response))


def test_rows_predict_the_response_in_each_view():
    rollouts = [make_rollout(4, 7, 3), make_rollout(6, 2, 2), make_rollout(3, 3, 0)]
    for views in ([r.sample.student for r in rollouts], [r.sample.teacher for r in rollouts]):
        batch = collate(rollouts, views, pad_token_id=0, pad_multiple=4)
        lengths = [v.num_tokens + r.token_ids.numel() for v, r in zip(views, rollouts, strict=True)]
        padding = -sum(lengths) % 4
        assert padding and batch.packing.lengths == (*lengths, padding)
        starts = batch.packing.starts.tolist()
        assert len(batch.token_ids) == batch.position_ids.size(1) == starts[-1] == sum(lengths) + padding
        # row t of the hidden states [S, 1, H] stands one position before the token it predicts
        assert torch.equal(batch.token_ids[batch.response_rows + 1], batch.response_tokens)
        assert batch.response_tokens.tolist() == [100, 101, 102, 100, 101]
        for start, view, rollout in zip(starts, views, rollouts, strict=False):
            p, r = view.num_tokens, rollout.token_ids.numel()
            assert torch.equal(batch.token_ids[start : start + p], view.token_ids)
            assert torch.equal(batch.token_ids[start + p : start + p + r], rollout.token_ids)
            assert torch.equal(batch.position_ids[:, start : start + p], view.position_ids)
            after = view.position_ids.max() + 1 + torch.arange(r)
            assert torch.equal(batch.position_ids[:, start + p : start + p + r], after.expand(3, r))
        assert not batch.token_ids[-padding:].any()


def make_responses(student: int, teacher: int, lengths: list[int], name: str) -> list[Rollout]:
    """Responses to one sample."""
    sample = make_rollout(student, teacher, 1, name).sample
    return [Rollout(sample, torch.arange(length), torch.zeros(length), i) for i, length in enumerate(lengths)]


def test_both_views_and_the_response_count_against_the_budget():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60, (40, 3), generator=generator).tolist()
    rollouts = [make_rollout(*size, name=str(i)) for i, size in enumerate(sizes)]
    groups = split_by_token_budget(rollouts, 200)
    assert sorted(r.sample.id for g in groups for r in g) == sorted(r.sample.id for r in rollouts)
    total = max(sum(size[view] + size[2] for size in sizes) for view in (0, 1))
    assert len(groups) <= total / 200 * 1.2 + 1, "microbatches are filled"
    for group in groups:
        for views in ([r.sample.student for r in group], [r.sample.teacher for r in group]):
            assert collate(group, views, 0).token_ids.numel() <= 200


def test_the_budget_is_used_up_and_an_overlong_rollout_stands_alone():
    assert [len(g) for g in split_by_token_budget([make_rollout(4, 6, 4) for _ in range(4)], 20)] == [2, 2]
    groups = split_by_token_budget([make_rollout(4, 50, 4), make_rollout(4, 6, 4)], 20)
    assert [len(g) for g in groups] == [1, 1]


def test_responses_to_a_prompt_stay_together_or_are_divided_evenly():
    """Whose images a microbatch holds decides how often the vision tower sees them."""
    whole = [make_responses(10, 20, [5, 9, 2, 7], name) for name in "abc"]
    groups = split_by_token_budget([r for answers in zip(*whole, strict=True) for r in answers], 210)
    assert sorted(sorted({r.sample.id for r in g}) for g in groups) == [["a", "b"], ["c"]]
    assert sorted(len(g) for g in groups) == [4, 8]

    groups = split_by_token_budget(make_responses(10, 20, [4] * 8, "a"), 24 * 7)
    assert [len(g) for g in groups] == [4, 4], "not seven and one"
    # even parts would be [30, 20] and [29, 1], of 90 and 70 tokens
    groups = split_by_token_budget(make_responses(10, 20, [30, 29, 20, 1], "a"), 89)
    assert sorted(sorted(len(r.token_ids) for r in g) for g in groups) == [[1, 30], [20, 29]]


def test_images_are_there_once_for_all_responses_of_a_prompt():
    first, second = make_responses(4, 6, [3, 2], "a"), make_responses(5, 6, [4], "b")
    for number, rollout in enumerate((first[0], second[0])):
        rollout.sample.student.pixel_values = torch.full((4 * (number + 1), 3), float(number))
        rollout.sample.student.grid_thw = torch.tensor([[1, 2, 2 * (number + 1)]])
    rollouts = [first[0], *second, first[1]]
    batch = collate(rollouts, [r.sample.student for r in rollouts], pad_token_id=0, pad_multiple=32)
    assert batch.pixel_values[:, 0].tolist() == [0.0] * 4 + [1.0] * 8
    assert batch.grid_thw.tolist() == [[1, 2, 2], [1, 2, 4]]
    assert batch.packing.patches == (4, 8) and batch.packing.prompts == (0, 1, 0)
    features = torch.tensor([10.0, 20.0, 21.0])[:, None].requires_grad_()  # of one and of two image tokens
    repeated = batch.packing.for_sequences(features, 4)
    assert repeated[:, 0].tolist() == [10.0, 20.0, 21.0, 10.0]
    repeated.backward(torch.tensor([1.0, 2.0, 3.0, 5.0])[:, None])
    assert features.grad is not None and features.grad[:, 0].tolist() == [6.0, 2.0, 3.0]


def test_images_wait_in_host_memory_until_their_microbatch_runs():
    rollout = make_rollout(student=4, teacher=6, response=3)
    batch = collate([rollout], [rollout.sample.student], pad_token_id=0)
    moved = batch.to(torch.device("meta"))
    assert moved.pixel_values is batch.pixel_values and moved.grid_thw is batch.grid_thw
    assert moved.packing.starts.is_meta and moved.packing.lengths == batch.packing.lengths
    stays = "pixel_values", "grid_thw", "packing"
    assert all(value.is_meta for name, value in vars(moved).items() if name not in stays)
