"""The choice of ranks from spectra by a rule or a budget. It works on numbers only, without files and torch."""
