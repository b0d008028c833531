"""What peer ids and addresses are; pure values and functions."""
