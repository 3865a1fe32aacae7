import io

from rich.console import Console

from jaxllm.data.audit import show_batch
from jaxllm.data.corpus import Document
from jaxllm.data.packing import Packing
from jaxllm.data.source import prepare


def printed(batch, bpe, channels, **options):
    console = Console(file=io.StringIO(), width=200, **options)
    show_batch(batch, bpe, channels, console)
    return console.file.getvalue()


def test_a_batch_in_colour(tmp_path, bpe):
    documents = [Document("the king", "prose"), Document("a queen", "verse")]
    source = prepare("s", documents, bpe, tmp_path / "s", Packing(40))
    batch = source.batch([0, -1])
    text = printed(batch, bpe, source.channels)
    used = int(batch.weight_BT[0].sum())
    sizes = [int((batch.segment_BT[0] == s).sum()) for s in (1, 2)]
    order = [source.channels[int(batch.channel_BT[0][batch.segment_BT[0] == s][0])] for s in (1, 2)]
    assert f"row 0 | 1: {order[0]} {sizes[0]}, 2: {order[1]} {sizes[1]} | loss on {used} of 40" in text
    assert "row 1 | padding only | loss on 0 of 40" in text
    assert "the king" in text
    assert "a queen" in text
    assert text.count("·") == 80 - used


def test_tokens_without_loss_are_dim(tmp_path, bpe):
    source = prepare("s", [Document("the king", "prose")], bpe, tmp_path / "s", Packing(16))
    batch = source.batch([0])
    assert "\x1b[36mthe king" not in printed(batch, bpe, source.channels)
    colour = printed(batch, bpe, source.channels, force_terminal=True, color_system="standard")
    assert "\x1b[36m" in colour
    assert "\x1b[2;36m" not in colour
    batch.weight_BT[0, :1] = 0
    assert "\x1b[2;36m" in printed(batch, bpe, source.channels, force_terminal=True, color_system="standard")
