"""Can the posterior's intervals be believed?"""
