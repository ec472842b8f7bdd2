from accountants import *
