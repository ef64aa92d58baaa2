"""Claims that are declared in a committed file before the runs that judge them.

`claims.toml` names arms (a plan and settings) and claims (a contrast of arms, and what is expected
of it). From it follow the runs (`planning`, `running`), the learning rate of each arm (`tuning`),
and the verdicts (`judging`); `history` asks git whether a claim was there before its runs.
"""

from robuq_bench.claims.declared import CLAIMS_FILE, Arm, Claim, Declared, Finding, load_claims

__all__ = ["CLAIMS_FILE", "Arm", "Claim", "Declared", "Finding", "load_claims"]
