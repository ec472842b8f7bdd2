"""dpkit's tests; a package, so that the oracle and the cases can be imported from anywhere in it."""
