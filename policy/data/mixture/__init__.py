"""Mixtures: several data sets as one."""
