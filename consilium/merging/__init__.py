"""Composition: models of several sites become one without a live federation. In: signed adapters. Out: a folder."""
