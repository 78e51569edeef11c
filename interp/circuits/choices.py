"""The choices that circuit functions offer, each written once.

Imports nothing heavy, so that commands can read it.
"""

from __future__ import annotations

from typing import Literal

EdgeMethod = Literal["eap", "clean-corrupted", "eap-ig-inputs", "eap-ig-activations"]
NodeMethod = Literal["atp", "atp-qk", "atp-carried", "ig-inputs", "ig-activations"]
ScreenMethod = Literal[NodeMethod, "atp*"]
Ablation = Literal["counterfactual", "zero", "mean", "resample"]
Ranking = Literal["signed", "absolute"]
Selection = Literal["top", "greedy"]
Chance = Literal["paths", "edges"]
Order = Literal["backward", "forward"]
Parents = Literal["late", "early", "random"]
Map = Literal["linear", "non-linear"]
