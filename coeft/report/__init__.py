"""`coeft report`: tables, statistics, pictures and one HTML page about finished runs."""
