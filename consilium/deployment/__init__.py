"""Composition: a federation across hospitals. In: an agreement, a site's own file. Out: a run (docs/deployment.md)."""
