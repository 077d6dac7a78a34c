"""Synthetic hospitals with a planted truth; docs/synth.md."""

from draf_dist.sources.synth.write import synthesise as synthesise
from draf_dist.sources.synth.write import synthesise_delivery as synthesise_delivery
