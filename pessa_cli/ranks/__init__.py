"""From spectra and a rule to ranks. Numbers only: no files and no torch."""
