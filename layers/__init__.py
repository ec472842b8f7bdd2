"""DP-compatible layers: torch only. Imported as ``dpkit.layers``.

Drop-ins for torch's layers, with the same constructors, ``state_dict`` keys and results, whose parameters meet the data
in linear maps and table look-ups only; what takes BatchNorm's place; `validate`, which lists what stands in the way of
private training, and `convert`, which puts the drop-ins into a model.
"""

from .attention import MultiheadAttention, multi_head_attention
from .cells import GRUCell, LSTMCell, RNNCell, gru_cell, lstm_cell, rnn_relu_cell, rnn_tanh_cell
from .conversion import Change, Conversion, convert
from .embedding import Embedding, EmbeddingBag, embedding_bag
from .known import known_linear
from .norm import FrozenBatchNorm, group_norm, groups_for
from .recurrent import GRU, LSTM, RNN, gru, lstm, rnn_relu, rnn_tanh
from .validation import Problem, problems, validate

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Change",
    "Conversion",
    "Embedding",
    "EmbeddingBag",
    "FrozenBatchNorm",
    "GRUCell",
    "LSTMCell",
    "MultiheadAttention",
    "Problem",
    "RNNCell",
    "convert",
    "embedding_bag",
    "group_norm",
    "groups_for",
    "gru",
    "gru_cell",
    "known_linear",
    "lstm",
    "lstm_cell",
    "multi_head_attention",
    "problems",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "validate",
]
