"""forkserver"""
