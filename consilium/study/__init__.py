"""Composition: studies. In: a file that says what is varied. Out: runs side by side, and tables that compare them."""
