"""The stream of batches: what was peeked at comes next, and any batch can be read again."""

import pytest

from nemo_vopd.data.loader_state import read_position
from nemo_vopd.data.processor import Processor
from nemo_vopd.data.prompts import PromptStream
from nemo_vopd.data.task_encoder import build_train_loader
from tests.helpers import tiny_config


def ids(batch) -> list[str]:
    return [sample.id for sample in batch.samples]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_that_was_taken_is_read_again(assets, tmp_path, num_workers):
    config = tiny_config(assets, tmp_path, f"data.num_workers={num_workers}", "data.shuffle_buffer_size=16")
    processor = Processor.from_pretrained(config.model.hf_path)

    def stream(position: bytes | None = None, *, remember: bool) -> PromptStream:
        loader = build_train_loader(config.data, "crop", processor, seed=1, dp_rank=0, dp_size=1)
        if position is not None:
            loader.restore_state_rank(read_position(position))
        return PromptStream(loader, position, remember=remember)

    plain = stream(remember=False)
    order = [ids(next(plain)) for _ in range(4)]
    after_four = plain.position()
    order += [ids(next(plain)) for _ in range(2)]
    plain.close()
    assert len({sample for batch in order for sample in batch}) == 48

    ahead = stream(remember=True)
    assert ids(next(ahead)) == order[0] and ahead.position(undo=True) is None
    assert ids(ahead.peek()) == ids(ahead.peek()) == order[1]
    assert [ids(next(ahead)) for _ in range(3)] == order[1:4]
    ahead.peek()
    lost, done = ahead.position(undo=True), ahead.position()
    ahead.close()
    for position, first in ((lost, 3), (done, 4), (after_four, 4)):
        again = stream(position, remember=True)
        assert [ids(next(again)) for _ in range(2)] == order[first : first + 2]
        assert again.position(undo=True) != position or first == 3
        again.close()
