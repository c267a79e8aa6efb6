"""Composition: a federation across hospitals. In: an agreement and a hospital's own file. Out: see docs/deployment.md."""
