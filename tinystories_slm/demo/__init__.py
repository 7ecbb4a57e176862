"""A web page on which a model generates stories, and the Space that shows it on the Hub."""
