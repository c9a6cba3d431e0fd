/* fork after the library's threads were started: the child does not have them, and must neither hang nor go without. */
#define _POSIX_C_SOURCE 200112L
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"

static int count_threads(void) {
  int count = -2; /* "." and ".." */
  DIR *tasks = opendir("/proc/self/task");
  CHECK(tasks != NULL);
  while (readdir(tasks) != NULL) ++count;
  closedir(tasks);
  return count;
}

int main(int argc, char **argv) {
  const unsigned long long seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
  rng r = {seed * 2654435769u + 1};
  printf("seed %llu\n", seed);
  fflush(stdout);
  decode_case c;
  for (;;) { /* a case with enough work for a second thread */
    case_make(&c, &r, ETAP_KV_BF16);
    c.problem.num_sms = 0;
    case_make_workspace(&c);
    case_run(&c);
    if (count_threads() > 1) break;
    case_free(&c);
  }
  for (int i = 0; i < 3; ++i) {
    case_poison_outputs(&c);
    case_run(&c);
    case_check(&c, "before fork");
    const pid_t child = fork();
    CHECK(child >= 0);
    case_poison_outputs(&c);
    case_run(&c);
    case_check(&c, child == 0 ? "child" : "parent");
    CHECK(count_threads() > 1);
    if (child == 0) continue; /* the child forks as well */
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    break;
  }
  case_free(&c);
  printf("passed\n");
  return 0;
}
