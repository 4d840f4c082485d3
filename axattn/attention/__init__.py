"""The one attention function that Transformers calls: what a call asks for, which backend serves it, and registration.

No kernel lives here (`axattn.backends`), and no plan is made here (`axattn.planning`).
"""
