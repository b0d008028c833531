"""What discovery decides, sans-IO: whom to dial next, who is said to hold what, what to tell."""
