"""What is done around a run: data before it, a plan of it, and evaluation, reports and exports after it."""
