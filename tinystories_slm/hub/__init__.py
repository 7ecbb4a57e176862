"""What a model takes along to the Hub."""
