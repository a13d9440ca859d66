"""What `tune` is made of: subjects, candidates, their profile, plans, and what became of them in real runs."""
