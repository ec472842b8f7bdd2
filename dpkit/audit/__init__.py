"""Audits: lower bounds on ε from what an attacker can tell, to be held beside the ε that is claimed.

coins = audit.flip(1000)                                   # train with the canaries where the coin says so
bound = audit.one_run(coins, scores, delta=1e-5)           # scores: high for canaries that seem to have been in
bound.epsilon, bound.refutes(engine.get_epsilon(1e-5))

audit.dirac(noise_multiplier=4.0).refuted()                # does this installation keep what it promises?
"""

from .bounds import LowerBound, attack, likelihood_ratio, one_run, p_value
from .canaries import Trial, dirac, flip
from .plot import draw

__all__ = ["LowerBound", "Trial", "attack", "dirac", "draw", "flip", "likelihood_ratio", "one_run", "p_value"]
