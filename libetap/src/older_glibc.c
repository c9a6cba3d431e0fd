/* Linked into the library of the wheels only, which is for an older glibc than that of the machine that builds it (make
 * wheels). GCC's libstdc++.a reads this flag of glibc 2.32 and later: whether the process has one thread, so that it
 * may do without atomic operations. 0, "perhaps not", is right in any process. */
char __libc_single_threaded = 0;
