"""What every package uses: errors, progress, text in messages, jobs, and packages that not every user has."""
