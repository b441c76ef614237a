"""What every stage's process needs: locks, costs, deadlines, memory checks and messages."""
