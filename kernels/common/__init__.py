"""What the ops share: dispatch, registration, tuning, pieces of Triton code, costs."""
