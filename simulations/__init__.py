"""A world to run it in: experiments, data, engines, reports and the command line."""
