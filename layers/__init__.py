"""DP-compatible layers: torch only. Imported as ``dpkit.layers``.

Drop-ins for torch's layers, with the same constructors, ``state_dict`` keys and results, whose parameters meet the data
in linear maps and table look-ups only.
"""

from .attention import MultiheadAttention, multi_head_attention
from .embedding import EmbeddingBag, embedding_bag
from .recurrent import GRU, LSTM, RNN, gru, lstm, rnn_relu, rnn_tanh

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "EmbeddingBag",
    "MultiheadAttention",
    "embedding_bag",
    "gru",
    "lstm",
    "multi_head_attention",
    "rnn_relu",
    "rnn_tanh",
]
