"""Comparing two models (verify), scoring models on data (eval), timing them (bench), and the search for a budget."""
