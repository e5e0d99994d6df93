/* Preloaded into a process: opens of paths that hold REFUSE_PATH fail with errno REFUSE_ERRNO, the first REFUSE_TIMES
   of them, and while the file REFUSE_WHILE exists when one is named.

   cc -shared -fPIC -o refusing_open.so refusing_open.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int refused;

static int refuse(const char *path) {
  const char *part = getenv("REFUSE_PATH"), *times = getenv("REFUSE_TIMES"), *number = getenv("REFUSE_ERRNO");
  const char *file = getenv("REFUSE_WHILE");
  if (!part || !times || !number || !strstr(path, part) || refused >= atoi(times)) return 0;
  if (file && access(file, F_OK)) return 0;
  refused++;
  errno = atoi(number);
  return 1;
}

#define WRAP(name)                                                                   \
  int name(const char *path, int flags, ...) {                                       \
    va_list rest;                                                                    \
    va_start(rest, flags);                                                           \
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0;        \
    va_end(rest);                                                                    \
    if (refuse(path)) return -1;                                                     \
    int (*next)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
    return next(path, flags, mode);                                                  \
  }

WRAP(open)
WRAP(open64)
