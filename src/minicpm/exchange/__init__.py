"""Whole models in, whole models out, checked: convert, compare, merge, export."""
