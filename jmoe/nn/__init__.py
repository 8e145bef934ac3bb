"""Linen modules: they own variables and call ops, balance and parallel."""
