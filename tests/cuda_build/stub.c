// libcuda.so.1 for a machine without a driver: keeps a record of what Triton's launcher asks to launch.
#include <stdint.h>

enum { CAPACITY = 1 << 16 };
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
} Launch;
typedef struct {  // begins as CUlaunchConfig
  Launch launch;
  void *stream, *attributes;
  unsigned attribute_count;
} LaunchConfig;

Launch launches[CAPACITY];
unsigned launch_count;

int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **arguments, void **extra) {
  if (!function || !arguments || launch_count == CAPACITY) return 1;
  launches[launch_count++] = config->launch;
  return 0;
}

int cuPointerGetAttribute(uint64_t *address, int attribute, uint64_t pointer) {
  *address = pointer;
  return 0;
}

int cuGetErrorString(int error, const char **text) {
  *text = "the stub refuses this launch";
  return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuCtxGetCurrent(void **context) {
  *context = (void *)1;
  return 0;
}
