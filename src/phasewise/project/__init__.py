"""What a user declares: the project (``phasewise.toml``, ``marts/*.sql``) and its pipeline of phases and steps.

Records and their validation. Talks to no server and no database. Any package above may import it. It runs in every
process.
"""
