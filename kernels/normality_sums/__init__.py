"""Sums over the entries of sorted tokens that tests of normality are made of."""
