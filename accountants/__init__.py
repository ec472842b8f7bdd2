"""Privacy accountants: numpy and scipy only. Imported as ``dpkit.accountants``.

Events (`Gaussian`, `PoissonSampled`, ...) say what was done; accountants (`RDPAccountant`, ...) judge it.
"""

from .accountant import Accountant
from .calibration import calibrate, delta, epsilon, make_accountant
from .errors import AccountingError, UnreachableTargetError, UnsupportedEventError
from .events import (
    ApproximateDP,
    Composed,
    DeterministicBatches,
    DiscreteGaussian,
    DiscreteLaplace,
    Event,
    Gaussian,
    GroupOf,
    Laplace,
    PoissonSampled,
    RandomAllocation,
    RandomizedResponse,
    Repeated,
    SampledWithoutReplacement,
    TruncatedPoissonSampled,
    adaptive_clipping,
    adaptive_clipping_gradient_noise,
    banded_matrix,
    dpsgd,
)
from .fdp import TradeOff, tradeoff
from .filters import BudgetSpentError, GDPFilter, RDPFilter, RDPOdometer, best_order
from .gdp import GDPAccountant
from .interop import from_dp_accounting, from_opacus
from .pld import PLDAccountant
from .rdp import RDPAccountant

__all__ = [
    "Accountant",
    "AccountingError",
    "ApproximateDP",
    "BudgetSpentError",
    "Composed",
    "DeterministicBatches",
    "DiscreteGaussian",
    "DiscreteLaplace",
    "Event",
    "GDPAccountant",
    "GDPFilter",
    "Gaussian",
    "GroupOf",
    "Laplace",
    "PLDAccountant",
    "PoissonSampled",
    "RDPAccountant",
    "RDPFilter",
    "RDPOdometer",
    "RandomAllocation",
    "RandomizedResponse",
    "Repeated",
    "SampledWithoutReplacement",
    "TradeOff",
    "TruncatedPoissonSampled",
    "UnreachableTargetError",
    "UnsupportedEventError",
    "adaptive_clipping",
    "adaptive_clipping_gradient_noise",
    "banded_matrix",
    "best_order",
    "calibrate",
    "delta",
    "dpsgd",
    "epsilon",
    "from_dp_accounting",
    "from_opacus",
    "make_accountant",
    "tradeoff",
]
