"""Composition: sites that took no part, and what they make of a few images of their own."""
