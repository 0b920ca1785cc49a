"""All peers, each behind one small adapter: `ATTENTION` takes queries, keys and values, `ENCODERS` take token ids."""

from bench.peers.base import AttentionPeer, EncoderPeer
from bench.peers.bigbird import BigBirdEncoder, BigBirdPegasusEncoder
from bench.peers.dense import BartEncoder, DenseAttention
from bench.peers.flex import FlexAttention
from bench.peers.longformer import LEDEncoder, LongformerAttention, LongformerEncoder
from bench.peers.lsg import LSGEncoder, LSGImplementation
from bench.peers.original import OriginalAttention, OriginalEncoder

ATTENTION: tuple[AttentionPeer, ...] = (
    LSGImplementation("triton"),
    LSGImplementation("cpp"),
    LSGImplementation("torch"),
    LSGImplementation("reference"),
    OriginalAttention(),
    FlexAttention(),
    DenseAttention(),
    LongformerAttention(),
)
ENCODERS: tuple[EncoderPeer, ...] = (
    LSGEncoder("triton"),
    LSGEncoder("cpp"),
    LSGEncoder("torch"),
    OriginalEncoder(),
    BartEncoder(),
    LongformerEncoder(),
    LEDEncoder(),
    BigBirdEncoder(),
    BigBirdPegasusEncoder(),
)
_ALL = (*ATTENTION, *ENCODERS)
LABELS = {peer.name: peer.label for peer in _ALL}
COLORS = {peer.name: peer.color for peer in _ALL}
NAMES = tuple(LABELS)
PRELOAD = tuple(dict.fromkeys(module for peer in _ALL for module in peer.preload))


def of_level(level: str) -> tuple[AttentionPeer, ...] | tuple[EncoderPeer, ...]:
    """The peers of a case's level."""
    return ATTENTION if level == "attention" else ENCODERS
